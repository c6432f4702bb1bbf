"""Generalized advantage estimation, and masked statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.api import SurgeryError


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns (Schulman et al. 2016, arXiv:1506.02438, equations 11 to 16).

    With δ_t = r_t + γ V(s_{t+1}) − V(s_t), the advantage is A_t = Σ_l (γλ)^l δ_{t+l}, and the return is A_t + V(s_t).

    Args:
        rewards: N × T.
        values: N × T.
        mask: N × T, True for actions. Other steps are skipped as if they did not exist.
        gamma: discount γ.
        lam: λ of the estimator.
        last_values: N values of the states after the last actions, for episodes that were truncated. None means that
            all episodes ended.

    Returns:
        Advantages and returns, N × T, 0 outside of the mask.

    Raises:
        SurgeryError: a factor is not between 0 and 1, or the shapes differ.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise SurgeryError(f"{name} is {factor}; pass a number from 0 to 1")
    same_shape(rewards=rewards, values=values, mask=mask)
    following = torch.zeros_like(values[:, 0]) if last_values is None else last_values.to(values)
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = torch.where(mask[:, t], running, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def same_shape(**tensors: Tensor) -> None:
    """Check that all tensors have one shape, rows × steps.

    Raises:
        SurgeryError: they do not.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise SurgeryError(f"the shapes differ or are not rows × steps: {told}; pass tensors of one shape")


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the mask. Values outside of the mask are ignored, even NaN."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Normalize to mean 0 and variance 1 over the mask, with 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    # If all values are equal, the floor keeps rounding errors from being scaled up to variance 1.
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0)
