"""SmoothQuant, and the effect of rounding activations on outputs.

SmoothQuant moves the scale of outlier input features from the activations into the weights (Xiao et al. 2023,
arXiv:2211.10438).
"""

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
    """A linear layer x Wᵀ whose input is rounded.

    Attributes:
        site: The site of W.
        layout: Number format and matrix form of its codes.
        smooth: Factors (in,) by which the input is divided before rounding, or None.
        per_token: Each row of the input has a scale of its own.
        twice: The rounding error of the input is rounded too.
    """

    site: Site
    layout: Layout
    smooth: Tensor | None = None
    per_token: bool = False
    twice: bool = False

    def rounded(self, x: Tensor) -> Tensor:
        """Round an input."""
        return round_activation(x, self.smooth, self.per_token, self.twice)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs of its calls, before passes that change them."""
        return tuple(input_before_adapters(operand(call)).name for call in self.site.calls)

    @property
    def matrix(self) -> Tensor:
        """The weight (out × in), read again on each access, because weights that a pass computes are not cached."""
        return self.layout.matrix(self.site.probe.stored(self.site))


def factors(largest: Tensor, matrices: Sequence[Tensor], alpha: float, dtype: torch.dtype) -> Tensor:
    """Compute SmoothQuant's factors: s = max|x|^α / max|w|^(1−α) for each feature, divided by their mean.

    x / s is rounded, and W s is encoded. A feature that is zero in all of the data or in all weights gets the factor 1,
    which is the mean of the others, so no factor is 0 or infinite.

    Args:
        largest: max|x| over the data (in,).
        matrices: All weights that read x, each (out × in).
        alpha: α.
        dtype: Dtype in which the factors are stored.

    Returns:
        Factors (in,) in fp32, rounded to `dtype`.
    """
    read = torch.stack([matrix.float().abs().amax(0) for matrix in matrices]).amax(0).double()
    entering = largest.to(read)
    live = (entering > 0) & (read > 0)
    found = torch.where(live, entering, 1).pow(alpha) / torch.where(live, read, 1).pow(1 - alpha)
    found = torch.where(live, found / found[live].mean(), 1)
    return found.clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max).to(dtype).float()


def smoothing(probe: Measurements, maps: Sequence[Map], alpha: float) -> dict[SiteKey, Tensor]:
    """Compute the factors of each layer.

    Layers that read the same input share their factors, so that the input is rounded once.

    Args:
        probe: Measurements on the data.
        maps: The layers.
        alpha: α.
    """
    # Layers with the same names of inputs read the same values.
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
    """Measure ‖(x̂ − x) Wᵀ‖ / ‖x Wᵀ‖ of each layer, where x̂ is the rounding of x, as the mean over rows of the data.

    The mean is taken over the ratios of rows, because in a ratio of totals a few very large rows would hide the others.
    Rows with x Wᵀ = 0 are left out. All layers are measured in one run over the data.
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
            # A layer that is called several times with one value counts it once for each call.
            totals[each.site.key] += float(ratios.sum()) * each.inputs.count(name)
            rows[each.site.key] += len(ratios) * each.inputs.count(name)

    probe.watch(set(readers), see)
    return {key: total / max(rows[key], 1) for key, total in totals.items()}


def _ratios(x: Tensor, reader: Map) -> Tensor:
    """Return ‖(x̂ − x) Wᵀ‖ / ‖x Wᵀ‖ of the rows of x with a nonzero output, in fp64."""
    moved = reader.rounded(x).float() - x.float()
    weight = reader.matrix.float().T
    given = ((v @ weight).reshape(-1, weight.shape[1]) for v in (moved, x.float()))
    gone, whole = (rows.double().norm(dim=1) for rows in given)
    return (gone / whole)[whole > 0]
