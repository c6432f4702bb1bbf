"""Divergence from a reference policy: the exact KL, and a penalty on rewards with an adaptive coefficient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.api import SurgeryError


def penalized_rewards(
    scores: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, coefficient: float
) -> Tensor:
    """Return the reward of each action, −β (log π(a) − log ρ(a)), plus the row's score at its last action.

    See Ziegler et al. 2019, arXiv:1909.08593, equation 2.

    Args:
        scores: N, one score per row.
        log_probs: N × T, log π of the actions under the policy.
        reference: N × T, log ρ of the actions under the reference policy.
        mask: N × T, True for actions.
        coefficient: β.
    """
    steps = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask, steps, -1).amax(1, keepdim=True)
    penalty = -coefficient * (log_probs - reference)
    return torch.where(mask, penalty, 0) + torch.where(mask & (steps == last), scores.unsqueeze(1), 0)


def sequence_kl(log_probs: Tensor, reference: Tensor, mask: Tensor) -> float:
    """Estimate KL(π ‖ ρ) of whole rows from sampled actions: the mean of the log-ratios summed over each row.

    Args:
        log_probs: N × T, log π of the actions.
        reference: N × T, log ρ of the actions.
        mask: N × T, True for actions.
    """
    return float(torch.where(mask, log_probs - reference, 0).sum(1).mean())


def categorical_kl(old: Tensor, new: Tensor) -> Tensor:
    """Return KL(old ‖ new) at each step, from log-probabilities whose last axis is the actions."""
    return (old.exp() * (old - new)).sum(-1)


@dataclass
class AdaptiveKL:
    """A coefficient β that keeps the KL of a row near a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

        e = clip((KL − target) / target, −0.2, 0.2),  β ← β (1 + gain · e)

    Attributes:
        coefficient: β.
        target: target KL.
        gain: speed of the adaptation.
    """

    coefficient: float = 0.1
    target: float = 6.0
    gain: float = 0.1

    def __post_init__(self) -> None:
        if self.target <= 0 or self.coefficient < 0 or self.gain < 0:
            raise SurgeryError(
                "AdaptiveKL: pass a target above 0, and a coefficient and a gain of at least 0"
            )

    def update(self, kl: float) -> float:
        """Adapt the coefficient to the KL of a batch, and return it."""
        error = min(max((kl - self.target) / self.target, -0.2), 0.2)
        self.coefficient *= 1 + self.gain * error
        return self.coefficient
