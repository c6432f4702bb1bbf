"""Combines several LoRAs at a site into one pair of factors, for every kind of weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from surgery.common.errors import PassError
from surgery.engine.contract.base import Place, RewritePass, Source
from surgery.engine.contract.combination import Combination
from surgery.graph.ops import CONV
from surgery.graph.sites import Site
from surgery.passes.lora.options import LoraOptions
from surgery.passes.lora.parts import Pair, pairs_of

# A (n, r, in) and B (n, out, r), with n = 1, or the number of groups of a convolution, or the number of experts.
Factors = tuple[Tensor, Tensor]
P = TypeVar("P", bound=RewritePass)


def combine(
    places: Sequence[Place], how: Combination, label: str
) -> tuple[RewritePass, list[dict[str, Tensor]]]:
    """One LoRA of scale 1 and a single rank, the largest at any place; smaller factors are padded with zeros.

    Args:
        places: The sites, each with the LoRAs that act there.
        how: The method, with its options.
        label: Name of the result.

    Returns:
        The pass, and its tensors at each place by their names in the pass.

    Raises:
        PassError: A source is no plain low-rank update, or its rank does not suit the method.
    """
    generator = torch.Generator().manual_seed(how.seed)
    found: list[dict[Pair, Factors]] = []
    for place in places:
        weights = [source.weight * cast(LoraOptions, source.pass_).scale for source in place.sources]
        sources = [plain_pairs(place.site, source, "combine") for source in place.sources]
        found.append(
            {
                pair: _combined(place.site.path, [own[pair] for own in sources], weights, how, generator)
                for pair in sources[0]
            }
        )
    rank = max(a.shape[1] for own in found for a, _ in own.values())
    pass_ = carrier(type(places[0].sources[0].pass_), places, rank, label)
    return pass_, [named(own, rank) for own in found]


def carrier(cls: type[P], places: Sequence[Place], rank: int, label: str) -> P:
    """A LoRA of scale 1 that acts at these places.

    Args:
        cls: Class of the pass.
        places: The sites, with the parts of fused projections as their LoRAs decided them.
        rank: Its rank.
        label: Its name.
    """
    target = ",".join(dict.fromkeys(f"path:{place.site.path}" for place in places))
    parts = {tuple(place.site.decided.get("rows") or ()) for place in places}
    chosen = ",".join(parts.pop()) or None if len(parts) == 1 else None
    return cls.parse({"target": target, "rank": rank, "alpha": float(rank), "parts": chosen, "as": label})


def plain_pairs(site: Site, source: Source, purpose: str) -> dict[Pair, Factors]:
    """A and B of each pair of a plain LoRA, as matrices in float32 or float64.

    Args:
        site: The site, as the LoRA decided it.
        source: The LoRA.
        purpose: Command or option that asks, for the message of the error.

    Raises:
        PassError: The LoRA is no plain low-rank update (it has DoRA or PiSSA).
    """
    lora = cast(LoraOptions, source.pass_)
    for option, given in (
        ("--dora", lora.dora), ("--init pissa", lora.init == "pissa"), ("--bias", lora.bias), ("--across", lora.across),
    ):  # fmt: skip
        if given:
            remedy = "make it one with export-peft and import-peft" if lora.init == "pissa" else "merge it"
            raise PassError(
                f"{purpose} at {site.path}: {source.entry} has {option}, which is no plain low-rank update; {remedy}"
            )
    return {
        pair: _as_matrices(site, source.tensors[pair.named("A")], source.tensors[pair.named("B")])
        for pair in pairs_of(site.decided.get("rows"))
    }


def named(pairs: Mapping[Pair, Factors], rank: int) -> dict[str, Tensor]:
    """Tensors of a LoRA by their names in the pass, padded with zeros to a rank; products stay as they are."""
    tensors = {}
    for pair, (a, b) in pairs.items():
        missing = rank - a.shape[1]
        tensors[pair.named("A")] = torch.nn.functional.pad(a, (0, 0, 0, missing))
        tensors[pair.named("B")] = torch.nn.functional.pad(b, (0, missing))
    return tensors


def _as_matrices(site: Site, a: Tensor, b: Tensor) -> Factors:
    """Factors in the shapes of `low_rank.factor_shapes` to stacked matrices, in float32 or float64."""
    work = torch.promote_types(a.dtype, torch.float32)
    a, b = a.detach().to(work), b.detach().to(work)
    if site.kind == CONV:
        groups = site.groups
        return (
            a.reshape(groups, a.shape[0] // groups, -1),
            b.reshape(groups, b.shape[0] // groups, -1),
        )
    return (a, b) if a.dim() == 3 else (a[None], b[None])


def _combined(
    path: str,
    pairs: Sequence[Factors],
    weights: Sequence[float],
    how: Combination,
    generator: torch.Generator,
) -> Factors:
    """One pair whose product is the combined update. `weights` include the scale of each source."""
    if how.method == "cat":
        return (
            torch.cat([a * w for (a, _), w in zip(pairs, weights, strict=True)], 1),
            torch.cat([b for _, b in pairs], 2),
        )
    if how.by_svd:
        rank = how.rank or max(a.shape[1] for a, _ in pairs)
        if how.method == "svd":
            return _nearest_to_sum(pairs, weights, rank)
        updates = [b @ a for a, b in pairs]
        return _nearest(how.of(updates, weights, generator), rank)
    ranks = {a.shape[1] for a, _ in pairs}
    if len(ranks) > 1:
        raise PassError(
            f"combine at {path}: ranks {' and '.join(map(str, sorted(ranks)))} differ, and {how.method} adds the "
            f"factors themselves; take cat, svd or an *_svd method"
        )
    # A and B each take the root of a weight, so that their product takes the weight; A also takes its sign.
    roots = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    return (
        how.of([a for a, _ in pairs], signed, generator),
        how.of([b for _, b in pairs], roots, generator),
    )


def _nearest(update: Tensor, rank: int) -> Factors:
    """The nearest update of a rank, its singular values split evenly (Eckart and Young 1936)."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    root = s[..., :rank].sqrt()
    return root[..., None] * vh[..., :rank, :], u[..., :rank] * root[..., None, :]


def _nearest_to_sum(pairs: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
    """The nearest update of a rank to Σ w·B A."""
    b = torch.cat([b * w for (_, b), w in zip(pairs, weights, strict=True)], 2)
    a = torch.cat([a for a, _ in pairs], 1)
    # Q_B R_B R_Aᵀ Q_Aᵀ: the small matrix R_B R_Aᵀ has the singular values of the sum, which is never computed.
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    inner_a, inner_b = _nearest(r_b @ r_a.mT, rank)
    return inner_a @ q_a.mT, q_b @ inner_b
