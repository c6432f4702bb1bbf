"""Task vectors (what training added) combined elementwise: weighted sums, TIES, DARE.

Each function takes the vectors of n tasks stacked on axis 0 and n weights, and gives one. The rules are those of
PEFT's `add_weighted_adapter`, so that a recipe found with it gives the same numbers here.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNES = frozenset(METHODS) - {"linear"}


def combine(
    vectors: Tensor, weights: Tensor, method: str, density: float, majority: str, generator: torch.Generator
) -> Tensor:
    """vectors: (n, …), weights: (n,). Returns (…).

    linear: the weighted sum (Ilharco et al. 2023, arXiv:2212.04089). magnitude_prune: of each vector the largest
    values, a fraction `density`, and then the sum. ties: the same, then at each place the sign of the majority is
    elected (by total value, or by frequency), and the mean of those that agree is taken (Yadav et al. 2023,
    arXiv:2306.01708). dare_linear, dare_ties: values are dropped at random and the rest divided by `density` (Yu et
    al. 2024, arXiv:2311.03099), then as before.
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
    kept = torch.zeros(vector.numel(), dtype=vector.dtype, device=vector.device)
    kept[vector.abs().flatten().topk(int(density * vector.numel())).indices] = 1
    return vector * kept.view(vector.shape)
