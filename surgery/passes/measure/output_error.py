"""The error of an op's outputs on data when its weight changes, exact, from the products XᵀX of its inputs.

A weight is seen as stacked matrices (see surgery.passes.algebra.factor): one for a linear map or a table, one per group
of a convolution (its columns are channels × kernel), one per expert. Let X be the rows that such a matrix multiplies.
A change E of the matrix changes the outputs on all of the data by the squared norm tr(E XᵀX Eᵀ), summed over the stack.
So only XᵀX (stack × in × in) has to be kept. For a table, X is one-hot, and XᵀX is the diagonal matrix of how often
each row is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.graph.marks import input_before_adapters
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, Call, arguments, operand, per_axis
from surgery.graph.sites import Measurements, Site, SiteKey

# Added to the diagonal of XᵀX, times its mean: without it, inputs that are always zero make XᵀX singular.
_DAMPING = 1e-6
# Bytes of products kept at once, unless one site alone needs more.
_ROOM = 2**31


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of a site's input on the data.

    Attributes:
        products: XᵀX in float64 (stack × in × in); for a table, its diagonal (1 × rows).
        rounded: The op reads x̂, a rounding of the x that adapters read. X is then [x̂, x − x̂], twice as wide, and
            `joined` makes the matrices that act on it.
    """

    products: Tensor
    rounded: bool = False

    @property
    def nothing(self) -> bool:
        """True if the input is zero throughout the data."""
        return not bool(self.products.any())

    def joined(self, by_op: Tensor, by_rest: Tensor) -> Tensor:
        """The matrices that act on X.

        Args:
            by_op: Matrices (stack × out × in) that act on the input of the op, x̂.
            by_rest: Matrices that act on the rounding error x − x̂; unused if the op reads x.
        """
        return torch.cat([by_op, by_rest], 2) if self.rounded else by_op

    def norm(self, moved: Tensor) -> float:
        """Norm over all of the data of the outputs of `moved` (stack × out × in, or from `joined`)."""
        wide = moved.double()
        return float((self._times(wide) * wide).sum().clamp(min=0).sqrt())

    def _times(self, wide: Tensor) -> Tensor:
        return wide * self.products[:, None] if self.products.dim() == 2 else wide @ self.products

    @cached_property
    def unseen(self) -> Tensor:
        """True for inputs that are zero throughout the data: rows that no token reads, unused experts and channels."""
        squares = self.products if self.products.dim() == 2 else self.products.diagonal(dim1=1, dim2=2)
        return (squares.unflatten(1, (2, -1)).sum(1) if self.rounded else squares) == 0

    def unseen_norm(self, moved: Tensor) -> float:
        """Norm of the values of `moved` (stack × out × in) that act on unseen inputs; outputs do not show them."""
        return float((moved.double().square() * self.unseen[:, None]).sum().sqrt())

    def decomposed(self, moved: Tensor) -> LowRankError:
        """The best corrections C x of the output error (moved X), for every rank (Zhang et al. 2024, arXiv:2410.06040).

        Let C be the best correction of full rank and L Lᵀ = xxᵀ. The corrections of lower rank are the truncated SVD
        of C L. If nothing is rounded, C is `moved` itself. Otherwise C = moved Xxᵀ (xxᵀ)⁻¹, and the part of the error
        that x cannot explain remains at every rank.
        """
        wide = moved.double()
        if self.products.dim() == 2:
            root = (self.products + self._damping(self.products)).sqrt()[:, None]
            left, values, right = torch.linalg.svd(wide * root, full_matrices=False)
            return LowRankError(left, values, right / root, 0.0)
        own, crossed, damping = self._of_x()
        own.diagonal(dim1=1, dim2=2).add_(damping)
        root = torch.linalg.cholesky(own)
        floor = 0.0
        if self.rounded:
            # Least squares for C with the damping as a ridge. The floor is the squared error of C itself.
            plain = wide[..., : own.shape[2]]
            against = wide @ crossed + plain * damping[:, None]
            whole = torch.linalg.solve_triangular(root.mT, against, upper=True, left=False)
            kept = (self._times(wide) * wide).sum() + (plain.square() * damping[:, None]).sum()
            floor = max(float(kept - whole.square().sum()), 0.0)
        else:
            whole = wide @ root
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        return LowRankError(left, values, right, floor)

    def _of_x(self) -> tuple[Tensor, Tensor, Tensor]:
        """Products of x with itself and of X with x, and the damping of the first."""
        crossed = self.products
        if self.rounded:
            # x = x̂ + (x − x̂), so products with x are sums over the two halves of X.
            crossed = sum(crossed.chunk(2, 2))  # type: ignore[assignment]
            own: Tensor = sum(crossed.chunk(2, 1))  # type: ignore[assignment]
        else:
            own = crossed.clone()
        return own, crossed, self._damping(own.diagonal(dim1=1, dim2=2))

    @staticmethod
    def _damping(squares: Tensor) -> Tensor:
        return _DAMPING * squares.mean(1, keepdim=True).clamp(min=1e-30)


@dataclass(frozen=True)
class LowRankError:
    """The best corrections of every rank, as truncations of left · diag(values) · right, with their errors.

    Attributes:
        left: Left factors (stack × out × n).
        values: Singular values (stack × n).
        right: Right factors (stack × n × in).
        floor: Squared error that remains at every rank.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    floor: float

    @cached_property
    def tails(self) -> list[float]:
        """Remaining error of the outputs by rank, from rank 0."""
        squared = self.values.square().sum(0).flip(0).cumsum(0).flip(0) + self.floor
        return [*squared.sqrt().tolist(), math.sqrt(self.floor)]

    def tail(self, rank: int) -> float:
        """Remaining error of the outputs at a rank."""
        return self.tails[min(rank, len(self.tails) - 1)]

    def rank_within(self, error: float) -> int:
        """The smallest rank, at least 1, with at most this error; one more than the largest if none has."""
        return max(next((rank for rank, tail in enumerate(self.tails) if tail <= error), len(self.tails)), 1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (stack × out × rank) and A (stack × rank × in)."""
        return self.left[..., :rank] * self.values[:, None, :rank], self.right[:, :rank]


class InputMeasurements:
    """Input statistics of sites, measured on first use for as many sites in one run as memory allows."""

    def __init__(self, probe: Measurements, sites: Iterable[tuple[Site, Collection[Any]]]) -> None:
        """Prepare measurements of these sites.

        Args:
            probe: Measurements of the program (`site.probe`).
            sites: Each site, with the ops that round its input (empty if none).
        """
        self.probe = probe
        self._sources = {
            site.key: [_Source(site, call, rounding) for call in site.calls] for site, rounding in sites
        }
        self._found: dict[tuple[str, ...], Tensor] = {}

    def at(self, site: Site, device: torch.device) -> InputStatistics:
        """The statistics of a site's input, on a device, summed over its calls.

        Raises:
            PassError: The input contains inf or NaN.
        """
        sources = self._sources[site.key]
        if any(source.key not in self._found for source in sources):
            self._found = {}  # free the last batch before the next is measured
            self._found = self._measure(self._batch(site.key))
        total = torch.stack([self._found[source.key] for source in sources]).sum(0)
        return InputStatistics(total.to(device), any(source.rounded is not None for source in sources))

    def _batch(self, key: SiteKey) -> list[_Source]:
        """The sources of a site, and of the sites after it while memory allows."""
        keys = list(self._sources)
        wanted: dict[tuple[str, ...], _Source] = {}
        room = _ROOM
        for each in keys[keys.index(key) :]:
            fresh = {s.key: s for s in self._sources[each] if s.key not in wanted}
            room -= sum(8 * math.prod(source.shape) for source in fresh.values())
            if wanted and room < 0:
                break
            wanted.update(fresh)
        return list(wanted.values())

    def _measure(self, sources: Sequence[_Source]) -> dict[tuple[str, ...], Tensor]:
        found = {source.key: torch.zeros(source.shape, dtype=torch.float64) for source in sources}
        # A value is kept only until every source that reads it has all of its values.
        uses = Counter(name for source in sources for name in source.names)
        held: dict[str, Tensor] = {}
        left = dict(uses)

        def see(name: str, value: Any) -> None:
            held[name] = value
            for source in sources:
                if name in source.names and all(each in held for each in source.names):
                    source.add_to(found[source.key], held)
                    for each in source.names:
                        left[each] -= 1
            for each in [each for each in held if not left[each]]:
                del held[each]
                left[each] = uses[each]  # for the next set of data

        self.probe.watch(set(uses), see)
        return found


class _Source:
    """The input of one call.

    Attributes:
        x: Name of the input before adapters.
        rounded: Name of the rounded input that the op reads, or None.
        gather: Name of the expert numbers, or None.
        names: All of these names.
        key: Identity of the products; calls with the same inputs share them.
        shape: Shape of the products.
    """

    def __init__(self, site: Site, call: Call, rounding: Collection[Any]) -> None:
        self.site, self.call = site, call
        self.x, read = input_before_adapters(operand(call)).name, operand(call)
        self.rounded = read.name if any(node.target in rounding for node in before(call)) else None
        self.gather = call.gather.name if call.gather is not None else None
        self.names = tuple({name: None for name in (self.x, self.rounded, self.gather) if name is not None})
        # Products of a convolution depend on its stride and kernel, those of a table on its size: they are not shared.
        alone = (call.node.name,) if site.kind in (CONV, EMBEDDING) else ()
        self.key = (site.kind, call.x_axis, *self.names, *alone)
        if site.kind == EMBEDDING:
            self.shape: tuple[int, ...] = (1, site.size("v"))
        else:
            stack = site.size("e") if site.kind == EXPERTS else site.groups
            inner = site.size("i") * (math.prod(site.shape[2:]) if site.kind == CONV else 1)
            wide = inner * (2 if self.rounded is not None else 1)
            self.shape = (stack, wide, wide)

    def add_to(self, found: Tensor, held: dict[str, Tensor]) -> None:
        """Add the products of one set of data."""
        x, gather = held[self.x], None if self.gather is None else held[self.gather]
        if self.site.kind == EMBEDDING:
            found[0] += torch.bincount(x.flatten(), minlength=found.shape[1]).to(found)
            return
        values = [x] if self.rounded is None else [held[self.rounded], x - held[self.rounded]]
        if not all(bool(value.isfinite().all()) for value in values):
            raise PassError(f"on the data the value {self.x!r} contains inf or NaN; clean the data")
        if self.call.x_axis == "column":
            values = [value.transpose(-2, -1) for value in values]
        for index, rows in self._rows(values, gather):
            found[index] += (rows.mT @ rows).to(found)

    def _rows(self, values: list[Tensor], gather: Tensor | None) -> Iterator[tuple[Any, Tensor]]:
        """Index into the stack, and the rows that its matrix multiplies, in float64."""
        if self.site.kind == CONV:
            parts = [_patches(self.site, self.call, value) for value in values]
            for each in zip(*parts, strict=True):
                yield slice(None), torch.cat([part.double() for part in each], 2)
            return
        joined = torch.cat(values, -1)
        if self.site.kind == LINEAR:
            yield 0, joined.reshape(-1, joined.shape[-1]).double()
            return
        for expert in range(self.shape[0]):
            chosen = joined[expert] if gather is None else joined[gather == expert]
            yield expert, chosen.reshape(-1, joined.shape[-1]).double()


def before(call: Call) -> list[fx.Node]:
    """Nodes that passes have inserted between the input of a site and its op, the last first."""
    found, node, first = [], operand(call), input_before_adapters(operand(call))
    while node is not first:
        found.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _patches(site: Site, call: Call, x: Tensor) -> Iterator[Tensor]:
    """The rows that a convolution's weight multiplies, sample by sample: (groups, positions, in)."""
    args, kernel = arguments(call.node), site.shape[2:]
    axes = len(kernel)
    stride, dilation = (per_axis(args[name], axes) for name in ("stride", "dilation"))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if args["padding"] in ("same", "valid"):
        ends = [(r // 2, r - r // 2) if args["padding"] == "same" else (0, 0) for r in reach]
    else:
        ends = [(p, p) for p in per_axis(args["padding"], axes)]
    for sample in x if x.dim() == axes + 2 else x[None]:
        if site.layout == "io":
            # A transposed convolution is a convolution with the kernel flipped, of its input with zeros between values.
            spread = sample.new_zeros(
                len(sample), *((n - 1) * s + 1 for n, s in zip(sample.shape[1:], stride, strict=True))
            )
            spread[(slice(None), *(slice(None, None, s) for s in stride))] = sample
            more = per_axis(args["output_padding"], axes)
            sides = [(r - p, r - p + m) for r, (p, _), m in zip(reach, ends, more, strict=True)]
            found = _windows(spread, sides, kernel, [1] * axes, dilation).flip(list(range(-axes, 0)))
        else:
            found = _windows(sample, ends, kernel, stride, dilation)
        grouped = found.unflatten(0, (site.groups, -1)).movedim(1, axes + 1)
        yield grouped.reshape(site.groups, math.prod(found.shape[1 : axes + 1]), -1)


def _windows(
    sample: Tensor,
    sides: Sequence[tuple[int, int]],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The window of a kernel at each position, as (channels, *positions, *kernel); `sides` is the padding by axis."""
    found = torch.nn.functional.pad(sample, [n for side in reversed(sides) for n in side])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 1):
        found = found.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    return found
