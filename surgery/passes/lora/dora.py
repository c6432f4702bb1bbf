"""DoRA's algebra: a weight as magnitude and direction, m ⊙ (W + s·B A) / ‖W + s·B A‖, with a norm for each output.

With c = m / ‖W + s·B A‖ the output is c ⊙ (W x + s·B A x) + b, written so that c = 1 and B = 0 leave it bit for
bit: c ⊙ out + (1 − c) ⊙ b + s·(c ⊙ B) A x, where out is what the op computes, with its bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.folds import Fold
from surgery.graph.marks import input_before_adapters
from surgery.graph.ops import CONV, EXPERTS, operand
from surgery.graph.packed import Apply, eagerly
from surgery.graph.rewrite.current import bias_now
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import low_rank
from surgery.passes.algebra.packed import unpacked
from surgery.passes.algebra.scale import ones_elsewhere

aten = torch.ops.aten


def output_axis(site: Site) -> int:
    """The axis of the stored weight that counts output features."""
    return next(site.layout.index(letter) for letter in "od" if letter in site.layout)


def magnitudes(site: Site, rows: int | None = None) -> tuple[int, ...]:
    """Shape of m: one for each output feature (of each expert)."""
    out = site.out_features if rows is None else rows
    return (site.size("e"), out) if site.kind == EXPERTS else (out,)


def norms(call: Apply, site: Site, weight: Any, a: Any, b: Any, scale: float) -> Any:
    """‖W + s·B A‖ of each output, of the shape of m. The same ops on tensors and in a graph give the same bits."""
    if site.kind == CONV:
        groups, (out, rank) = site.groups, _shape(b)[:2]
        shapes = ([groups, out // groups, -1], [groups, out // groups, rank], [groups, rank, -1])
        stacked, left, right = (
            call(aten.reshape.default, value, shape)
            for value, shape in zip((weight, b, a), shapes, strict=True)
        )
        summed = call(aten.baddbmm.default, stacked, left, right, alpha=scale)
        return call(aten.reshape.default, call(aten.linalg_vector_norm.default, summed, 2, [2]), [out])
    last = len(site.layout) - 1
    outs_first = output_axis(site) < last
    left, right = b, a
    if not outs_first:
        left, right = (call(aten.transpose.int, value, last - 1, last) for value in (a, b))
    add = aten.baddbmm.default if site.kind == EXPERTS else aten.addmm.default
    summed = call(add, weight, left, right, alpha=scale)
    return call(aten.linalg_vector_norm.default, summed, 2, [last if outs_first else last - 1])


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.meta["val"].shape if isinstance(value, fx.Node) else value.shape)


def part_of(call: Apply, site: Site, weight: Any, rows: Sequence[int], index: Any) -> Any:
    """The rows of a fused projection's weight that one part has. index: these as a tensor, where they have gaps."""
    axis = output_axis(site)
    if low_rank.is_run(rows):
        return call(aten.slice.Tensor, weight, axis, rows[0], rows[-1] + 1)
    return call(aten.index_select.default, weight, axis, index)


@dataclass(frozen=True)
class Part:
    """One pair with its magnitude: values of tensors or nodes. rows: of a fused projection, else None."""

    a: Any
    b: Any
    magnitude: Any
    rows: tuple[int, ...] | None = None
    index: Any = None

    def ratio(self, call: Apply, site: Site, weight: Any, scale: float) -> Any:
        """c = m / ‖W + s·B A‖ of these rows."""
        own = weight if self.rows is None else part_of(call, site, weight, self.rows, self.index)
        return call(aten.div.Tensor, self.magnitude, norms(call, site, own, self.a, self.b, scale))


def rewrite(
    site: Site, g: Rewriter, parts: Sequence[Part], scale: float, dropped: fx.Node | None, full_gradient: bool
) -> fx.Node:
    """The site's output with DoRA on it. dropped: what enters after dropout, where that differs from g.x."""

    @cache
    def weight() -> fx.Node:
        return unpacked(site, g) if site.packed else g.stored

    def ratio(part: Part) -> fx.Node:
        if full_gradient:
            return part.ratio(g.call, site, weight(), scale)
        stored, a, b = (g.call(aten.detach.default, value) for value in (weight(), part.a, part.b))
        return Part(a, b, part.magnitude, part.rows, part.index).ratio(g.call, site, stored, scale)

    ratios = []
    for part in parts:
        shared = len(site.calls) > 1  # by the calls of a module that is used again
        key = f"ratio of {part.magnitude.target}"
        ratios.append(g.once(key, partial(ratio, part)) if shared else ratio(part))
    whole = ratios[0] if parts[0].rows is None else ones_elsewhere(g, ratios, g["rows"])
    out = _scaled_base(site, g, whole, dropped)
    scale *= g.weight
    branches = [
        (part, g.call(aten.mul.Tensor, part.b, _as_factor(g, ratio, part.b)))
        for part, ratio in zip(parts, ratios, strict=True)
    ]
    if parts[0].rows is None:
        return low_rank.add_branch(site, g, parts[0].a, branches[0][1], scale, dropped, out)
    updates = [(low_rank.branch(site, g, part.a, b, x=dropped), part.rows or ()) for part, b in branches]
    return low_rank.add_rows(site, g, updates, scale, out)


def _scaled_base(site: Site, g: Rewriter, ratio: fx.Node, dropped: fx.Node | None) -> fx.Node:
    """out + w·(c − 1) ⊙ W x, with as few passes over the activations as may be."""
    bias = bias_now(g.site_call)
    own_input = dropped is None and operand(g.site_call) is input_before_adapters(operand(g.site_call))
    alone = own_input and g.output is g.op_output
    if alone and bias is None and g.weight == 1:
        return g.call(aten.mul.Tensor, g.op_output, _along(site, g, ratio))
    more = g.call(aten.sub.Scalar, ratio, 1.0)
    if g.weight != 1:
        more = g.call(aten.mul.Scalar, more, g.weight)
    if not own_input:
        base = _product(site, g, dropped or g.x)
        return _plus(g, g.output, base, _along(site, g, more))
    if bias is None:
        return _plus(g, g.output, g.op_output, _along(site, g, more))
    taken = _along(site, g, g.call(aten.mul.Tensor, bias, more))
    if not alone:
        return _plus(g, g.call(aten.sub.Tensor, g.output, taken), g.op_output, _along(site, g, more))
    factor = ratio if g.weight == 1 else g.call(aten.add.Scalar, more, 1.0)
    return g.call(aten.sub.Tensor, g.call(aten.mul.Tensor, g.op_output, _along(site, g, factor)), taken)


def _product(site: Site, g: Rewriter, x: fx.Node) -> fx.Node:
    """W x of another activation, without a bias; of a packed weight by its own op."""
    if not site.packed:
        return low_rank.product(site, g, x, g.stored, site.layout)
    again, bias = g.call_op_on(x), bias_now(g.site_call)
    if bias is None:
        return again
    # as channels of a convolution or features
    return g.call(aten.sub.Tensor, again, _along(site, g, bias))


def _plus(g: Rewriter, value: fx.Node, base: fx.Node, factor: fx.Node) -> fx.Node:
    return g.call(aten.add.Tensor, value, g.call(aten.mul.Tensor, base, factor))


def _along(site: Site, g: Rewriter, vector: fx.Node) -> fx.Node:
    """A number for each output, to be multiplied with the site's output."""
    if site.kind == CONV:
        return g.call(aten.reshape.default, vector, [-1, *(1 for _ in site.float_shape[2:])])
    if site.kind == EXPERTS:
        gather = g.site_call.gather
        own = vector if gather is None else g.call(aten.index_select.default, vector, 0, gather)
        return g.call(aten.unsqueeze.default, own, -1 if g.site_call.x_axis == "column" else -2)
    return vector


def _as_factor(g: Rewriter, ratio: fx.Node, b: fx.Node) -> fx.Node:
    """c with axes of length one behind it, to be multiplied with B."""
    shape = _shape(ratio)
    return g.call(aten.reshape.default, ratio, [*shape, *(1 for _ in range(len(_shape(b)) - len(shape)))])


@dataclass(frozen=True)
class Magnify(Fold):
    """Merge: W ← W + w·(c ⊙ (W₀ + s·B A) − W₀), where W₀ is the weight that the op reads, without adapters.

    c is computed as in the graph, in the dtype of A, so that what did not train folds to the weight's own bits.
    """

    reads_original: ClassVar[bool] = True

    site: Site
    part: Part
    scale: float
    weight: float

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        site, rows = self.site, self.part.rows
        a, b, magnitude = (t.detach() for t in (self.part.a, self.part.b, self.part.magnitude))
        part = Part(a, b, magnitude, rows, self._index())
        ratio = part.ratio(eagerly, site, original.to(part.a.dtype), self.scale).to(weight.dtype)
        shape = [1] * weight.dim()
        shape[output_axis(site)] = site.out_features
        if site.kind == EXPERTS:
            shape[0] = ratio.shape[0]
        more = ratio - 1
        if rows is not None:
            more = weight.new_zeros(site.out_features)
            more[list(rows)] = ratio - 1
        weight.addcmul_(original, more.view(shape), value=self.weight)
        b = part.b.to(weight.dtype) * ratio.view(
            *ratio.shape, *(1 for _ in range(part.b.dim() - ratio.dim()))
        )
        return low_rank.AddLowRank(site, part.a, b, self.scale * self.weight, rows).apply(weight, weight)

    def _index(self) -> Tensor | None:
        rows = self.part.rows
        return None if rows is None else torch.tensor(rows, device=self.part.a.device)


def zero_output(site: Site, weight: Tensor, rows: Mapping[str, Sequence[int]]) -> int | None:
    """The first output feature whose weight is zero, so that it has no direction, or None."""
    axis = output_axis(site)
    kept = (0, axis) if site.kind == EXPERTS else (axis,)
    empty = ~weight.ne(0).any(dim=[d for d in range(weight.dim()) if d not in kept])
    wanted = range(site.out_features) if not rows else [row for own in rows.values() for row in own]
    dead = empty.any(0) if site.kind == EXPERTS else empty
    return next((row for row in wanted if bool(dead[row])), None)
