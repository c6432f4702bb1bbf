"""Divergence from a reference policy: as a penalty on rewards with an adaptive coefficient, and exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.api import SurgeryError


def penalized_rewards(
    scores: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, coefficient: float
) -> Tensor:
    """Rewards of each action: −β (log π(a) − log ρ(a)), and the row's score besides at its last action.

    scores: one for each row. reference: log ρ of the actions under the reference policy.
    (Ziegler et al. 2019, arXiv:1909.08593, equation 2.)
    """
    steps = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask, steps, -1).amax(1, keepdim=True)
    penalty = -coefficient * (log_probs - reference)
    return torch.where(mask, penalty, 0) + torch.where(mask & (steps == last), scores.unsqueeze(1), 0)


def sequence_kl(log_probs: Tensor, reference: Tensor, mask: Tensor) -> float:
    """The estimate of KL(π ‖ ρ) of whole rows, from actions that π took: the mean of their summed log-ratios."""
    return float(torch.where(mask, log_probs - reference, 0).sum(1).mean())


def categorical_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL(old ‖ new) at each step, of log-probabilities whose last axis is the actions."""
    return (old.exp() * (old - new)).sum(-1)


@dataclass
class AdaptiveKL:
    """The coefficient β that keeps the KL of a row near a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2):

    e = clip((KL − target) / target, −0.2, 0.2) and β ← β (1 + gain · e).
    """

    coefficient: float = 0.1
    target: float = 6.0
    gain: float = 0.1

    def __post_init__(self) -> None:
        if self.target <= 0 or self.coefficient < 0 or self.gain < 0:
            raise SurgeryError(
                "an adaptive KL needs a target above 0, and a coefficient and a gain of 0 or more"
            )

    def update(self, kl: float) -> float:
        """Take the KL of a batch into account; returns the new coefficient."""
        error = min(max((kl - self.target) / self.target, -0.2), 0.2)
        self.coefficient *= 1 + self.gain * error
        return self.coefficient
