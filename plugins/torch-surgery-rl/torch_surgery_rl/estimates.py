"""Advantages: generalised advantage estimation, and whitening."""

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
    """Advantages and returns, rows × steps (Schulman et al. 2016, arXiv:1506.02438, equations 11 to 16).

    δ_t = r_t + γ V(s_{t+1}) − V(s_t), A_t = Σ_l (γλ)^l δ_{t+l}, and the return that a value is fitted to is
    A_t + V(s_t). mask: which steps are actions; the others are passed over, as if they were not there.
    last_values: V of the state after a row's last action, where the episode was cut off and did not end.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise SurgeryError(f"{name} is {factor}, and a discount is from 0 to 1")
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
    """Raises SurgeryError where these are not all rows × steps of one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise SurgeryError(f"rows × steps of one shape are needed, and these are {told}")


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over what the mask lets through; what it does not may be anything."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over what the mask lets through, 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    # The floor keeps rounding from becoming advantages where all of them are the same.
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0)
