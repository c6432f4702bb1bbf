"""Factors of several LoRAs at one place made into one pair, for every kind of weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.common.errors import PassError
from surgery.engine.contract.combination import Combination
from surgery.graph.ops import CONV
from surgery.graph.sites import Site

# a: (n, r, in), b: (n, out, r): one pair, one for each group of a convolution, or one for each expert.
Pair = tuple[Tensor, Tensor]


def as_matrices(site: Site, a: Tensor, b: Tensor) -> Pair:
    """Factors as `lowrank.factor_shapes` has them to matrices, in fp32 at least."""
    work = torch.promote_types(a.dtype, torch.float32)
    a, b = a.detach().to(work), b.detach().to(work)
    if site.kind == CONV:
        groups = site.groups
        return (
            a.reshape(groups, a.shape[0] // groups, -1),
            b.reshape(groups, b.shape[0] // groups, -1),
        )
    return (a, b) if a.dim() == 3 else (a[None], b[None])


def combined(
    where: str, pairs: Sequence[Pair], weights: Sequence[float], how: Combination, generator: torch.Generator
) -> Pair:
    """One pair whose product is the combined update. weights: with each source's own scale multiplied in.

    Raises PassError where factors of different ranks would have to be added.
    """
    if how.method == "cat":
        return (
            torch.cat([a * w for (a, _), w in zip(pairs, weights, strict=True)], 1),
            torch.cat([b for _, b in pairs], 2),
        )
    if how.by_svd:
        rank = how.rank or max(a.shape[1] for a, _ in pairs)
        if how.method == "svd":
            return _nearest_of_sum(pairs, weights, rank)
        updates = [b @ a for a, b in pairs]
        return _nearest(how.of(updates, weights, generator), rank)
    ranks = {a.shape[1] for a, _ in pairs}
    if len(ranks) > 1:
        raise PassError(
            f"combine at {where}: ranks {' and '.join(map(str, sorted(ranks)))} differ, and {how.method} adds the "
            f"factors themselves; take cat, svd or an *_svd method"
        )
    # Half of a weight's root on each side; the sign on one.
    roots = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    return (
        how.of([a for a, _ in pairs], signed, generator),
        how.of([b for _, b in pairs], roots, generator),
    )


def named(pairs: Mapping[str, Pair], rank: int) -> dict[str, Tensor]:
    """Tensors of a LoRA by their names: the same products with zeros up to a rank, which one adapter has everywhere."""
    tensors = {}
    for end, (a, b) in pairs.items():
        missing = rank - a.shape[1]
        tensors[f"A{end}"] = torch.nn.functional.pad(a, (0, 0, 0, missing))
        tensors[f"B{end}"] = torch.nn.functional.pad(b, (0, missing))
    return tensors


def _nearest(update: Tensor, rank: int) -> Pair:
    """The nearest update of a rank, its singular values split evenly (Eckart and Young 1936)."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    root = s[..., :rank].sqrt()
    return root[..., None] * vh[..., :rank, :], u[..., :rank] * root[..., None, :]


def _nearest_of_sum(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    """The same of Σ w·B A, whose singular values those of a matrix of the summed rank are."""
    b = torch.cat([b * w for (_, b), w in zip(pairs, weights, strict=True)], 2)
    a = torch.cat([a for a, _ in pairs], 1)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    inner_a, inner_b = _nearest(r_b @ r_a.mT, rank)
    return inner_a @ q_a.mT, q_b @ inner_b
