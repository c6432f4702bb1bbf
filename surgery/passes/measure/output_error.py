"""How far an op's outputs move when its weight does: exactly, by the products of what enters it on the data.

A weight is seen as stacked matrices (surgery.passes.algebra.factor): one for a linear map or a table, one for each group of a
convolution (its columns are channels × kernel), one for each expert. With X the rows on which such a matrix acts, the
squared norm of what E adds to the outputs over all of the data is tr(E XᵀX Eᵀ), summed over the stack: so XᵀX (stack ×
in × in) is all that has to be kept. Rows of a table are picked by one-hot X, whose XᵀX is how often each is read.
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

_DAMPING = 1e-6  # of the mean of XᵀX's diagonal: inputs that the data never use
_ROOM = 2**31  # bytes of products that are kept at once, where one site does not take more


@dataclass(frozen=True)
class Entering:
    """What enters a site on the data. products: XᵀX, fp64 (stack × in × in); of a table its diagonal (1 × rows).

    rounded: the op reads x̂, a rounding of the x that adapters read. X is then [x̂, x − x̂], twice as wide, and a matrix
    that acts on it is one of `joined`.
    """

    products: Tensor
    rounded: bool = False

    @property
    def nothing(self) -> bool:
        """Whether only zeros enter."""
        return not bool(self.products.any())

    def joined(self, by_op: Tensor, by_rest: Tensor) -> Tensor:
        """The matrices that act on X: by_op on what the op reads, by_rest on what rounding took away from that."""
        return torch.cat([by_op, by_rest], 2) if self.rounded else by_op

    def norm(self, moved: Tensor) -> float:
        """Of what `moved` (stack × out × in, or `joined`) makes of the data."""
        wide = moved.double()
        return float((self._times(wide) * wide).sum().clamp(min=0).sqrt())

    def _times(self, wide: Tensor) -> Tensor:
        return wide * self.products[:, None] if self.products.dim() == 2 else wide @ self.products

    @cached_property
    def unseen(self) -> Tensor:
        """Inputs that are zero throughout the data: rows that no token picks, experts and channels out of use."""
        squares = self.products if self.products.dim() == 2 else self.products.diagonal(dim1=1, dim2=2)
        return (squares.unflatten(1, (2, -1)).sum(1) if self.rounded else squares) == 0

    def unseen_norm(self, moved: Tensor) -> float:
        """Of the part of `moved` (stack × out × in) that the data never use: nothing but its own values tells of it."""
        return float((moved.double().square() * self.unseen[:, None]).sum().sqrt())

    def decomposed(self, moved: Tensor) -> Decomposed:
        """The corrections C x that leave least of (moved X), of every rank at once (Zhang et al. 2024,
        arXiv:2410.06040): with L Lᵀ = xxᵀ they are the truncated SVD of C L, for the C that leaves least of all.

        Where nothing is rounded that C is `moved` itself. Otherwise it is moved Xxᵀ (xxᵀ)⁻¹, and what the rest of X
        makes is left whatever the rank.
        """
        wide = moved.double()
        if self.products.dim() == 2:
            root = (self.products + self._damping(self.products)).sqrt()[:, None]
            left, values, right = torch.linalg.svd(wide * root, full_matrices=False)
            return Decomposed(left, values, right / root, 0.0)
        own, crossed, damping = self._of_x()
        own.diagonal(dim1=1, dim2=2).add_(damping)
        root = torch.linalg.cholesky(own)
        floor = 0.0
        if self.rounded:
            plain = wide[..., : own.shape[2]]
            against = wide @ crossed + plain * damping[:, None]
            whole = torch.linalg.solve_triangular(root.mT, against, upper=True, left=False)
            kept = (self._times(wide) * wide).sum() + (plain.square() * damping[:, None]).sum()
            floor = max(float(kept - whole.square().sum()), 0.0)
        else:
            whole = wide @ root
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        return Decomposed(left, values, right, floor)

    def _of_x(self) -> tuple[Tensor, Tensor, Tensor]:
        """x's own products, those of X with x, and the damping of the first."""
        crossed = self.products
        if self.rounded:
            crossed = sum(crossed.chunk(2, 2))  # type: ignore[assignment]
            own: Tensor = sum(crossed.chunk(2, 1))  # type: ignore[assignment]
        else:
            own = crossed.clone()
        return own, crossed, self._damping(own.diagonal(dim1=1, dim2=2))

    @staticmethod
    def _damping(squares: Tensor) -> Tensor:
        return _DAMPING * squares.mean(1, keepdim=True).clamp(min=1e-30)


@dataclass(frozen=True)
class Decomposed:
    """left · diag(values) · right (stack by stack), of which every rank leaves least error. floor: squared, left by
    all of them."""

    left: Tensor
    values: Tensor
    right: Tensor
    floor: float

    @cached_property
    def tails(self) -> list[float]:
        """By rank, the error of the outputs that is left."""
        squared = self.values.square().sum(0).flip(0).cumsum(0).flip(0) + self.floor
        return [*squared.sqrt().tolist(), math.sqrt(self.floor)]

    def tail(self, rank: int) -> float:
        return self.tails[min(rank, len(self.tails) - 1)]

    def rank_within(self, error: float) -> int:
        """The smallest rank, at least 1, that leaves no more; one past the last where none does."""
        return max(next((rank for rank, tail in enumerate(self.tails) if tail <= error), len(self.tails)), 1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (stack × out × rank) and A (stack × rank × in)."""
        return self.left[..., :rank] * self.values[:, None, :rank], self.right[:, :rank]


class Inputs:
    """What enters sites, measured when it is asked for: for as many at once as there is room."""

    def __init__(self, probe: Measurements, sites: Iterable[tuple[Site, Collection[Any]]]) -> None:
        """sites: each with the ops that round what enters it, or none."""
        self.probe = probe
        self._sources = {
            site.key: [_Source(site, call, rounding) for call in site.calls] for site, rounding in sites
        }
        self._found: dict[tuple[str, ...], Tensor] = {}

    def at(self, site: Site, device: torch.device) -> Entering:
        """device: of the weight."""
        sources = self._sources[site.key]
        if any(source.key not in self._found for source in sources):
            self._found = {}
            self._found = self._measure(self._batch(site.key))
        total = torch.stack([self._found[source.key] for source in sources]).sum(0)
        return Entering(total.to(device), any(source.rounded is not None for source in sources))

    def _batch(self, key: SiteKey) -> list[_Source]:
        """The sources of a site, and of those that follow while there is room."""
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
    """What enters one call. names: of the graph's values that tell it. shape: of its products."""

    def __init__(self, site: Site, call: Call, rounding: Collection[Any]) -> None:
        self.site, self.call = site, call
        self.x, read = input_before_adapters(operand(call)).name, operand(call)
        self.rounded = read.name if any(node.target in rounding for node in before(call)) else None
        self.gather = call.gather.name if call.gather is not None else None
        self.names = tuple({name: None for name in (self.x, self.rounded, self.gather) if name is not None})
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
        x, gather = held[self.x], None if self.gather is None else held[self.gather]
        if self.site.kind == EMBEDDING:
            found[0] += torch.bincount(x.flatten(), minlength=found.shape[1]).to(found)
            return
        values = [x] if self.rounded is None else [held[self.rounded], x - held[self.rounded]]
        if not all(bool(value.isfinite().all()) for value in values):
            raise PassError(f"on the data the value {self.x!r} is infinite or no number; mend the data")
        if self.call.x_axis == "column":
            values = [value.transpose(-2, -1) for value in values]
        for index, rows in self._rows(values, gather):
            found[index] += (rows.mT @ rows).to(found)

    def _rows(self, values: list[Tensor], gather: Tensor | None) -> Iterator[tuple[Any, Tensor]]:
        """Which of the stack, and the rows on which it acts; fp64."""
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
    """What passes have put between what enters a site and its op."""
    found, node, first = [], operand(call), input_before_adapters(operand(call))
    while node is not first:
        found.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _patches(site: Site, call: Call, x: Tensor) -> Iterator[Tensor]:
    """The rows on which a convolution's weight acts, for one sample after the other: (groups, positions, in)."""
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
            # Transposed: a convolution, with the kernel turned round, of what has zeros between its values.
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
    """(channels, *positions, *kernel): what a kernel sees at each position. sides: what is padded, axis by axis."""
    found = torch.nn.functional.pad(sample, [n for side in reversed(sides) for n in side])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 1):
        found = found.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    return found
