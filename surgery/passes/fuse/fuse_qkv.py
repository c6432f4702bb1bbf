"""fuse-qkv: stacks the q, k and v projections of one input into one projection."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.base import attribute_of
from surgery.engine.contract.effect import Effect
from surgery.engine.contract.numerics import Numerics, rounded
from surgery.engine.contract.pattern import ADAPTERS, PatternPass, read_elsewhere, role_in, stored
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.marks import is_superseded, mark_of
from surgery.graph.patterns import Match, Pattern, any_of, dtype_of, ops, shape_of, value
from surgery.graph.patterns.expressions import Op
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View

aten = torch.ops.aten

# A kernel blocks a wider product differently, so sums run in another order: 1e-7 of their scale in fp32.
IN_ONE_PRODUCT = rounded(
    1e-5,
    "a product of another width sums in another order",
    {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1},
)


class FuseQkv(PatternPass):
    """Fused projections: q = x Wqᵀ + bq, k and v become one product x [Wq; Wk; Wv]ᵀ + [bq; bk; bv], which is split.

    The pass fuses the query, key and value projections of an attention if they are linear layers of one input, of any
    widths (also with grouped queries). If the queries have an input of their own, it fuses keys and values. It finds
    the projections by dataflow, not by names. Weights that other ops read too, and quantized or adapted ones, are not
    fused.

    The stacked weight is a new tensor, which trains. The tensors that it replaces are no longer read, and no longer
    count as parameters. If only some of the projections have a bias, the others get zeros. The fused layer is a site of
    role `attn.qkv` (or `attn.kv`), and targets such as `attn.q` name its parts. Train mode computes the same. The
    outputs stay the same up to rounding: 1e-5 of their scale in fp32, 1e-12 in fp64, 2e-2 in fp16, 1e-1 in bf16.

    `split-qkv` splits the fused layer again and keeps the trained values; undo restores the original tensors. There is
    no merged form.
    """

    name: ClassVar[str] = "fuse-qkv"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass fuse-qkv -o fused/"
    )
    on: ClassVar[tuple[str, ...]] = ("qkv",)
    role: ClassVar[str] = "attn.qkv"
    numerics: ClassVar[Numerics] = IN_ONE_PRODUCT
    before: ClassVar[tuple[str, ...]] = ADAPTERS

    @property
    def effect(self) -> Effect:
        return replace(super().effect, adds_weights=True)

    def patterns(self, view: View) -> Sequence[Pattern]:
        return _side_by_side(view, "qkv"), _side_by_side(view, "kv")

    def path_of(self, match: Match) -> str:
        """Return the common prefix of the projections' paths: the path of their attention."""
        first, *rest = (
            str(match[f"{letter}_weight"].target).split(".")[:-1] for letter in match.pattern.name
        )
        count = 0
        while count < len(first) and all(other[count : count + 1] == [first[count]] for other in rest):
            count += 1
        return ".".join(first[:count])

    def check(self, site: Site) -> str | None:
        view = site.probe.view
        match = self.match(site, view)
        letters = match.pattern.name
        shared = read_elsewhere(match, view, [f"{x}_{what}" for x in letters for what in ("weight", "bias")])
        return shared or super().check(site)

    def decide(self, site: Site) -> dict[str, Any]:
        match = self.match(site, site.probe.view)
        letters = match.pattern.name
        held = {
            f"{x}_{what}": str(match[f"{x}_{what}"].target)
            for x in letters
            for what in ("weight", "bias")
            if f"{x}_{what}" in match
        }
        rows = {x: list(shape_of(match[f"{x}_weight"])) for x in letters}
        return {"reads": held, "shapes": rows}

    def outcome(self, site: Site) -> Outcome:
        note = " + ".join(f"{shape[0]} of {letter}" for letter, shape in site.decided["shapes"].items())
        return Outcome(note=note, unused=frozenset(site.decided["reads"].values()))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        shapes, held = site.decided["shapes"], site.decided["reads"]
        rows, columns = sum(shape[0] for shape in shapes.values()), next(iter(shapes.values()))[1]
        specs = {"weight": TensorSpec((rows, columns), self._filled(site, "weight"))}
        if any(name.endswith("bias") for name in held):
            specs["bias"] = TensorSpec((rows,), self._filled(site, "bias"))
        return specs

    def _filled(self, site: Site, what: str) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            shapes, held = site.decided["shapes"], site.decided["reads"]
            sizes = [shape[0] for shape in shapes.values()]
            for letter, rows in zip(shapes, tensor.split(sizes), strict=True):
                name = held.get(f"{letter}_{what}")
                rows.copy_(site.probe.tensor(name)) if name else rows.zero_()

        return fill

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        # A module that is called twice, with weights of its own for each call, has two sites.
        own = f"{attribute_of(self)}_{site.key.ordinal}" if site.key.ordinal else attribute_of(self)
        return {name: f"{site.key.owner}.{own}.{name}".lstrip(".") for name in tensors}

    def replacement(self, site: Site, match: Match, g: Rewriter) -> Sequence[fx.Node]:
        shapes = site.decided["shapes"]
        bias = g["bias"] if "bias" in g.tensors else None
        both = g.model_op(aten.linear.default, match["x"], g["weight"], bias)
        parts = g.model_op(aten.split_with_sizes.default, both, [shape[0] for shape in shapes.values()], -1)
        return [g.model_op(operator.getitem, parts, number) for number in range(len(shapes))]


def _side_by_side(view: View, letters: str) -> Pattern:
    """Build a pattern of several outputs: the projections of one input to the given letters, "qkv" or "kv"."""

    def projection(x: Any, letter: str) -> Op:
        bias = any_of(stored(f"{letter}_bias"), None)
        made = ops.linear(x, stored(f"{letter}_weight"), bias)
        return made.where(lambda node: role_in(view, node) == f"attn.{letter}", f"an attn.{letter}")

    def alike(match: Match) -> str | None:
        if not _of_one_attention(view, match.outputs):
            return "they belong to different attentions"
        dtypes = {dtype_of(match[f"{letter}_weight"]) for letter in letters}
        return None if len(dtypes) == 1 else "the weights have different dtypes"

    x = value("x")
    outputs = tuple(projection(x, letter) for letter in letters)
    outputs[0].anchor()
    return Pattern(letters, outputs, alike)


def _of_one_attention(view: View, nodes: Sequence[fx.Node]) -> bool:
    """True if the projections belong to the same attention."""
    # Superseded projections are outside the dataflow that `view` reads, so the mark of the pass decides.
    if is_superseded(nodes[0]):
        return len({mark_of(node).at for node in nodes}) == 1
    serves = view.once("attentions by projection", lambda: _attentions(view))
    return bool(set.intersection(*(serves.get(node, set()) for node in nodes)))


def _attentions(view: View) -> dict[fx.Node, set[int]]:
    """Map each projection to the indices of the attentions that it belongs to."""
    found: dict[fx.Node, set[int]] = {}
    for number, attention in enumerate(view.attentions):
        for node in (*attention.q, *attention.k, *attention.v):
            found.setdefault(node, set()).add(number)
    return found
