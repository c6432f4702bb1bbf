"""DoRA: a weight as magnitude and direction, m ⊙ (W + s·B A)/‖W + s·B A‖, with a norm per output (arXiv:2402.09353).

With c = m/‖W + s·B A‖ the output is c ⊙ (W x + s·B A x) + b. It is computed as c ⊙ out + (1 − c) ⊙ b + s·(c ⊙ B) A x,
where out is the output of the op, with its bias. For c = 1 and B = 0 this is bit for bit `out`, so insertion is exact.
Earlier adapters keep what they add, and the bias stays as it is. The magnitude m (out; experts × out) is trained and
starts at the norm of W. The norm is a constant to the gradient, as in section 4.3 of the paper, unless the option
`--full-gradient` is given. In train mode with dropout, W reads the same dropped input as the branch, as in PEFT. At
weight w the op computes with W + w·(c ⊙ (W + s·B A) − W), which is also the merge.

A packed weight is unpacked in the graph for the norms (not of stacked experts); W x is computed by the op itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.folds import Fold
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.marks import input_before_adapters
from surgery.graph.ops import CONV, EXPERTS, operand
from surgery.graph.packed import Apply, eagerly
from surgery.graph.rewrite.current import bias_now
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import low_rank, packed
from surgery.passes.algebra.scale import ones_elsewhere, part_index
from surgery.passes.lora.options import LoraOptions
from surgery.passes.lora.parts import Branch, Pair, index_spec
from surgery.passes.lora.variant import Variant, unreadable_weight

aten = torch.ops.aten


class Dora(Variant):
    """DoRA at one site: B is scaled by c in the graph, and the output of the op too."""

    reads_weight: ClassVar[bool] = True

    @classmethod
    def expectations(cls, lora: LoraOptions) -> Expectations:
        if lora.full_gradient:
            return Expectations(redirected="the norm removes the part of a weight's gradient along it")
        return Expectations(detached="DoRA's norm is a constant to the gradient (section 4.3 of the paper)")

    def refusal(self) -> str | None:
        reason = unreadable_weight(self.site, "--dora")
        if reason or not self.site.probe.in_memory:
            return reason
        dead = zero_output(self.site, self.site.probe.dequantized(self.site), self.pairs)
        if dead is None:
            return None
        return f"the weight of its output {dead} is zero, which has no direction; leave --dora out"

    # -- tensors

    def pair_tensors(self, pair: Pair, factors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {"m": TensorSpec(magnitude_shape(self.site, pair), partial(self._fill_magnitude, pair))}

    def _fill_magnitude(self, pair: Pair, magnitude: Tensor) -> None:
        # The same ops as in the graph, with B A = 0, so that c = 1 bit for bit.
        site, weight = self.site, self.site.probe.stored(self.site)
        if pair.rows is not None:
            weight = rows_of(eagerly, site, weight, pair.rows, torch.tensor(pair.rows, device=weight.device))
        shapes = low_rank.factor_shapes(site, self.lora.rank, pair.features)
        a, b = (weight.new_zeros(shape) for shape in shapes)
        magnitude.copy_(norms(eagerly, site, weight, a, b, self.lora.scale))

    def site_tensors(self) -> dict[str, TensorSpec]:
        specs = {}
        covered = [pair.rows for pair in self.pairs if pair.rows is not None]
        if covered:
            specs["rows"] = index_spec(part_index(covered, self.site.out_features))
        for number, value in enumerate(packed.constants(self.site)):
            specs[f"constant_{number}"] = TensorSpec(
                tuple(value.shape), trainable=False, dtype=value.dtype, value=value.clone()
            )
        return specs

    # -- graph

    def branches(self, g: Rewriter, dropped: fx.Node | None) -> tuple[list[Branch], fx.Node | None]:
        site = self.site
        indices = [g[pair.named("index")] if pair.interleaved else None for pair in self.pairs]
        directions = []
        for pair, index in zip(self.pairs, indices, strict=True):
            a, b, magnitude = (g[pair.named(name)] for name in ("A", "B", "m"))
            directions.append(Direction(a, b, magnitude, pair.rows, index))
        ratios = self._ratios(g, directions)
        whole = ratios[0] if directions[0].rows is None else ones_elsewhere(g, ratios, g["rows"])
        out = _scaled_base(site, g, whole, dropped)
        return [
            Branch(pair, own.a, g.call(aten.mul.Tensor, own.b, _as_factor(g, ratio, own.b)))
            for pair, own, ratio in zip(self.pairs, directions, ratios, strict=True)
        ], out

    def _ratios(self, g: Rewriter, directions: Sequence[Direction]) -> list[fx.Node]:
        """Insert c of each pair."""
        site, scale = self.site, self.lora.scale

        @cache
        def weight() -> fx.Node:
            return packed.unpacked(site, g) if site.packed else g.stored

        def ratio(own: Direction) -> fx.Node:
            if self.lora.full_gradient:
                return own.ratio(g.call, site, weight(), scale)
            stored, a, b = (g.call(aten.detach.default, value) for value in (weight(), own.a, own.b))
            return Direction(a, b, own.magnitude, own.rows, own.index).ratio(g.call, site, stored, scale)

        if len(site.calls) == 1:
            return [ratio(own) for own in directions]
        # The calls of a module that is used again share one norm.
        return [g.once(f"ratio of {own.magnitude.target}", partial(ratio, own)) for own in directions]

    # -- merge

    def pair_fold(self, pair: Pair, tensors: Mapping[str, Tensor], weight: float) -> Fold | None:
        a, b, magnitude = (tensors[pair.named(name)] for name in ("A", "B", "m"))
        return Magnify(self.site, Direction(a, b, magnitude, pair.rows), self.lora.scale, weight)


@dataclass(frozen=True)
class Direction:
    """The factors and the magnitude of one pair, as tensors or graph values.

    Attributes:
        a: The factor A.
        b: The factor B.
        magnitude: m.
        rows: Output features that they cover; None for all.
        index: `rows` as a tensor or graph value, needed where they are interleaved.
    """

    a: Any
    b: Any
    magnitude: Any
    rows: tuple[int, ...] | None = None
    index: Any = None

    def ratio(self, call: Apply, site: Site, weight: Any, scale: float) -> Any:
        """c = m/‖W + s·B A‖ of the output features covered.

        Args:
            call: Calls an op, on tensors or in a graph.
            site: The site.
            weight: W with all of its output features.
            scale: s.
        """
        own = weight if self.rows is None else rows_of(call, site, weight, self.rows, self.index)
        return call(aten.div.Tensor, self.magnitude, norms(call, site, own, self.a, self.b, scale))


def output_axis(site: Site) -> int:
    """Axis of the stored weight that counts output features."""
    return next(site.layout.index(letter) for letter in "od" if letter in site.layout)


def magnitude_shape(site: Site, pair: Pair) -> tuple[int, ...]:
    """Shape of m: one value per output feature (of each expert)."""
    out = site.out_features if pair.features is None else pair.features
    return (site.size("e"), out) if site.kind == EXPERTS else (out,)


def norms(call: Apply, site: Site, weight: Any, a: Any, b: Any, scale: float) -> Any:
    """‖W + s·B A‖ per output feature, in the shape of m. Tensors and a graph get the same ops, so the same bits.

    Args:
        call: Calls an op, on tensors or in a graph.
        site: The site.
        weight: W, or the rows of it that the pair covers.
        a: The factor A.
        b: The factor B.
        scale: s.
    """
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
    outputs_first = output_axis(site) < last
    left, right = b, a
    if not outputs_first:
        left, right = (call(aten.transpose.int, value, last - 1, last) for value in (a, b))
    add = aten.baddbmm.default if site.kind == EXPERTS else aten.addmm.default
    summed = call(add, weight, left, right, alpha=scale)
    return call(aten.linalg_vector_norm.default, summed, 2, [last if outputs_first else last - 1])


def rows_of(call: Apply, site: Site, weight: Any, rows: Sequence[int], index: Any) -> Any:
    """Rows of a fused projection's weight that belong to one part.

    Args:
        call: Calls an op, on tensors or in a graph.
        site: The fused projection.
        weight: Its weight.
        rows: Output features of the part.
        index: `rows` as a tensor or graph value; read only where they are interleaved.
    """
    axis = output_axis(site)
    if low_rank.is_run(rows):
        return call(aten.slice.Tensor, weight, axis, rows[0], rows[-1] + 1)
    return call(aten.index_select.default, weight, axis, index)


def zero_output(site: Site, weight: Tensor, pairs: Sequence[Pair]) -> int | None:
    """The first covered output feature whose weight is zero, so that it has no direction, or None.

    Args:
        site: The site.
        weight: Its weight in floats.
        pairs: Pairs of the site, which cover output features.
    """
    axis = output_axis(site)
    kept = (0, axis) if site.kind == EXPERTS else (axis,)
    zero = ~weight.ne(0).any(dim=[d for d in range(weight.dim()) if d not in kept])
    dead = zero.any(0) if site.kind == EXPERTS else zero
    for pair in pairs:
        for row in range(site.out_features) if pair.rows is None else pair.rows:
            if bool(dead[row]):
                return row
    return None


def _scaled_base(site: Site, g: Rewriter, ratio: fx.Node, dropped: fx.Node | None) -> fx.Node:
    """Insert out + w·(c − 1) ⊙ W x, with as few ops on activations as possible."""
    bias = bias_now(g.site_call)
    # The output of the op is W x + b only if no earlier adapter changes the input of the op.
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
    # The op has added b, which must not be scaled: (c − 1) ⊙ b is subtracted again.
    taken = _along(site, g, g.call(aten.mul.Tensor, bias, more))
    if not alone:
        return _plus(g, g.call(aten.sub.Tensor, g.output, taken), g.op_output, _along(site, g, more))
    factor = ratio if g.weight == 1 else g.call(aten.add.Scalar, more, 1.0)
    return g.call(aten.sub.Tensor, g.call(aten.mul.Tensor, g.op_output, _along(site, g, factor)), taken)


def _product(site: Site, g: Rewriter, x: fx.Node) -> fx.Node:
    """Insert W x of another input, without the bias; a packed weight is multiplied by its own op."""
    if not site.packed:
        return low_rank.product(site, g, x, g.stored, site.layout)
    again, bias = g.call_op_on(x), bias_now(g.site_call)
    if bias is None:
        return again
    return g.call(aten.sub.Tensor, again, _along(site, g, bias))


def _plus(g: Rewriter, value: fx.Node, base: fx.Node, factor: fx.Node) -> fx.Node:
    return g.call(aten.add.Tensor, value, g.call(aten.mul.Tensor, base, factor))


def _along(site: Site, g: Rewriter, vector: fx.Node) -> fx.Node:
    """Reshape one value per output feature so that it multiplies the site's output."""
    if site.kind == CONV:
        return g.call(aten.reshape.default, vector, [-1, *(1 for _ in site.float_shape[2:])])
    if site.kind == EXPERTS:
        gather = g.site_call.gather
        own = vector if gather is None else g.call(aten.index_select.default, vector, 0, gather)
        return g.call(aten.unsqueeze.default, own, -1 if g.site_call.x_axis == "column" else -2)
    return vector


def _as_factor(g: Rewriter, ratio: fx.Node, b: fx.Node) -> fx.Node:
    """Reshape c with trailing axes of length one, so that it multiplies B."""
    shape = _shape(ratio)
    return g.call(aten.reshape.default, ratio, [*shape, *(1 for _ in range(len(_shape(b)) - len(shape)))])


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.meta["val"].shape if isinstance(value, fx.Node) else value.shape)


@dataclass(frozen=True)
class Magnify(Fold):
    """Merge: W ← W + w·(c ⊙ (W₀ + s·B A) − W₀), where W₀ is the weight that the op reads, without adapters.

    c is computed as in the graph, in the dtype of A, so that an untrained adapter leaves every bit of the weight.

    Attributes:
        site: The site.
        direction: Factors and magnitude.
        scale: s.
        weight: Scale w of the application.
    """

    reads_original: ClassVar[bool] = True

    site: Site
    direction: Direction
    scale: float
    weight: float

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        site, own = self.site, self.direction
        ratio = self._ratio(original).to(weight.dtype)
        more = ratio - 1
        if own.rows is not None:
            more = weight.new_zeros(site.out_features)
            more[list(own.rows)] = ratio - 1
        shape = [1] * weight.dim()
        shape[output_axis(site)] = site.out_features
        if site.kind == EXPERTS:
            shape[0] = ratio.shape[0]
        weight.addcmul_(original, more.view(shape), value=self.weight)
        trailing = [1] * (own.b.dim() - ratio.dim())
        b = own.b.to(weight.dtype) * ratio.view(*ratio.shape, *trailing)
        return low_rank.AddLowRank(site, own.a, b, self.scale * self.weight, own.rows).apply(weight, weight)

    def _ratio(self, original: Tensor) -> Tensor:
        own = self.direction
        a, b, magnitude = (tensor.detach() for tensor in (own.a, own.b, own.magnitude))
        index = None if own.rows is None else torch.tensor(own.rows, device=a.device)
        found: Tensor = Direction(a, b, magnitude, own.rows, index).ratio(
            eagerly, self.site, original.to(a.dtype), self.scale
        )
        return found
