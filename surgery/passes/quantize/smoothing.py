"""SmoothQuant: what one feature of an activation is too large by goes into the weights (Xiao et al. 2023,
arXiv:2211.10438), and how far the rounding of activations moves outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.graph.marks import input_before_adapters
from surgery.graph.ops import operand
from surgery.graph.sites import Measurements, Site, SiteKey
from surgery.passes.quantize.matrix import Layout
from surgery.passes.quantize.ops import round_activation


@dataclass(frozen=True)
class Map:
    """A linear map of rows, and how what enters it is rounded. smooth: (in,) or None."""

    site: Site
    layout: Layout
    smooth: Tensor | None = None
    per_token: bool = False
    twice: bool = False

    def rounded(self, x: Tensor) -> Tensor:
        return round_activation(x, self.smooth, self.per_token, self.twice)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that enter its calls, before passes that change what enters."""
        return tuple(input_before_adapters(operand(call)).name for call in self.site.calls)

    @property
    def matrix(self) -> Tensor:
        """The weight (out × in), read anew: one that a pass computes is not kept."""
        return self.layout.matrix(self.site.probe.stored(self.site))


def factors(largest: Tensor, matrices: Sequence[Tensor], alpha: float, dtype: torch.dtype) -> Tensor:
    """s (in,): max|x|^α / max|w|^(1−α) by feature, over the mean of that; x / s is rounded, and W s is coded.

    largest: max|x| (in,). matrices: all that read x (out × in). fp32, of values that `dtype` has. A feature that is
    zero in all of the data, or in all weights, says nothing and has 1, the mean of the others: no s is 0 or infinite.
    """
    read = torch.stack([matrix.float().abs().amax(0) for matrix in matrices]).amax(0).double()
    entering = largest.to(read)
    live = (entering > 0) & (read > 0)
    found = torch.where(live, entering, 1).pow(alpha) / torch.where(live, read, 1).pow(1 - alpha)
    found = torch.where(live, found / found[live].mean(), 1)
    return found.clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max).to(dtype).float()


def smoothing(probe: Measurements, maps: Sequence[Map], alpha: float) -> dict[SiteKey, Tensor]:
    """The factors of each map: the same ones for all that read the very same values, so that these are rounded once."""
    together: dict[tuple[str, ...], list[Map]] = defaultdict(list)
    for each in maps:
        together[each.inputs].append(each)
    found: dict[SiteKey, Tensor] = {}
    for group in together.values():
        first = group[0].site
        largest, matrices = probe.largest(first), [each.matrix for each in group]
        shared = factors(largest, matrices, alpha, first.float_dtype)
        found.update((each.site.key, shared) for each in group)
    return found


def moved_by_rounding(probe: Measurements, maps: Sequence[Map]) -> dict[SiteKey, float]:
    """‖(x̂ − x) Wᵀ‖ / ‖x Wᵀ‖ of each map, the mean over the rows of the data, with x̂ the rounding of x.

    Over rows, as a few that are far larger than the rest would hide those in a total. A row of which the map makes zero
    has no such ratio and is left out. All maps are measured in one run over the data.
    """
    readers: dict[str, list[Map]] = defaultdict(list)
    for each in maps:
        for name in set(each.inputs):
            readers[name].append(each)
    totals: dict[SiteKey, float] = dict.fromkeys((each.site.key for each in maps), 0.0)
    rows = dict.fromkeys(totals, 0)

    def see(name: str, x: Tensor) -> None:
        for each in readers[name]:
            ratios = _ratios(x, each)
            totals[each.site.key] += float(ratios.sum()) * each.inputs.count(name)
            rows[each.site.key] += len(ratios) * each.inputs.count(name)

    probe.watch(set(readers), see)
    return {key: total / max(rows[key], 1) for key, total in totals.items()}


def _ratios(x: Tensor, reader: Map) -> Tensor:
    """‖(x̂ − x) Wᵀ‖ / ‖x Wᵀ‖ of the rows of x of which W makes something; fp64."""
    moved = reader.rounded(x).float() - x.float()
    weight = reader.matrix.float().T
    given = ((v @ weight).reshape(-1, weight.shape[1]) for v in (moved, x.float()))
    gone, whole = (rows.double().norm(dim=1) for rows in given)
    return (gone / whole)[whole > 0]
