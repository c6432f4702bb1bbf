"""Elementwise combination of task vectors (trained minus original weights): weighted sums, TIES, DARE.

The rules are those of PEFT's `add_weighted_adapter`, so that the same settings give the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNES = frozenset(METHODS) - {"linear"}


def combine(
    vectors: Tensor, weights: Tensor, method: str, density: float, majority: str, generator: torch.Generator
) -> Tensor:
    """Combine n task vectors elementwise.

    - linear: the weighted sum (Ilharco et al. 2023, arXiv:2212.04089).
    - magnitude_prune: keep the largest values of each vector, a fraction `density`; then the weighted sum.
    - ties: prune in the same way; elect the majority sign at each position; divide the weighted sum of the values with
      that sign by their number (Yadav et al. 2023, arXiv:2306.01708).
    - dare_linear, dare_ties: drop values at random and divide the rest by `density` (Yu et al. 2024,
      arXiv:2311.03099); then as linear or ties.

    Args:
        vectors: Task vectors, of shape (n, …).
        weights: Weight of each vector, of shape (n,).
        method: One of METHODS.
        density: Fraction of values to keep.
        majority: Rule to elect a sign by: "total" value or "frequency".
        generator: Random generator of the dare methods.

    Returns:
        The combined vector, of shape (…).
    """
    if method.startswith("dare") and density < 1:
        kept = torch.rand(vectors.shape, generator=generator) < density
        vectors = vectors * kept.to(vectors) / density
    elif method in PRUNES and density < 1:
        vectors = torch.stack([_largest(vector, density) for vector in vectors])
    weighted = vectors * weights.to(vectors).view(-1, *(1 for _ in vectors.shape[1:]))
    if not method.endswith("ties"):
        return weighted.sum(0)
    counted = vectors.sign() if majority == "frequency" else vectors
    elected = torch.where(counted.sum(0) >= 0, 1.0, -1.0).to(vectors)
    agree = vectors.sign() == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(vector: Tensor, density: float) -> Tensor:
    """The vector with only its largest values by magnitude, a fraction `density`; the others are zero."""
    kept = torch.zeros(vector.numel(), dtype=vector.dtype, device=vector.device)
    kept[vector.abs().flatten().topk(int(density * vector.numel())).indices] = 1
    return vector * kept.view(vector.shape)
