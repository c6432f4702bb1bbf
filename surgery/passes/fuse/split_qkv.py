"""split-qkv: splits a fused projection into one for queries, one for keys and one for values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.base import attribute_of
from surgery.engine.contract.effect import Effect
from surgery.engine.contract.numerics import Numerics
from surgery.engine.contract.pattern import ADAPTERS, PatternPass, read_elsewhere, role_in, stored
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.marks import is_superseded
from surgery.graph.patterns import Match, Pattern, any_of, axis, ops, shape_of, value
from surgery.graph.patterns.expressions import Op
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes.fuse.fuse_qkv import IN_ONE_PRODUCT

aten = torch.ops.aten

_FUSED, _THIRDS = ("attn.qkv", "attn.kv", "attn.qk"), "thirds"


class SplitQkv(PatternPass):
    """Split projections: x Wᵀ + b becomes x Wqᵀ + bq, x Wkᵀ + bk and x Wvᵀ + bv, each with its rows of W and b.

    The pass reverses `fuse-qkv`. It also splits projections that are fused in the model itself: GPT-2's Conv1D, timm's
    qkv, and models that interleave q, k and v by heads. It finds the rows of each part by dataflow (`surgery inspect`
    shows them). If the model splits the product into q, k and v, in this order, the new outputs replace these three.
    Otherwise the new outputs are concatenated, and put in the old order of rows if that differs.

    Each part gets its own weight and bias, with the current values of W and b. They train, and are sites of role
    `attn.q`, `attn.k` and `attn.v`. W and b are no longer read, and no longer count as parameters. Train mode computes
    the same. The outputs stay the same up to rounding: 1e-5 of their scale in fp32, 1e-12 in fp64, 2e-2 in fp16, 1e-1
    in bf16. Undo restores W and b. There is no merged form.
    """

    name: ClassVar[str] = "split-qkv"
    example: ClassVar[str] = "surgery apply hf:openai-community/gpt2 --pass split-qkv -o split/"
    on: ClassVar[tuple[str, ...]] = ("fused-qkv",)
    role: ClassVar[str] = "attn.qkv"
    numerics: ClassVar[Numerics] = IN_ONE_PRODUCT
    before: ClassVar[tuple[str, ...]] = ADAPTERS

    @property
    def effect(self) -> Effect:
        return replace(super().effect, adds_weights=True)

    def patterns(self, view: View) -> Sequence[Pattern]:
        return [_in_thirds(view), *_whole(view)]

    def path_of(self, match: Match) -> str:
        return str(match["weight"].target).rpartition(".")[0]

    def check(self, site: Site) -> str | None:
        view = site.probe.view
        match = self.match(site, view)
        # Every row must belong to exactly one part; otherwise rows would be lost or duplicated.
        parts = view.site_of(match["op"]).parts
        if sorted(row for rows in parts.values() for row in rows) != list(range(shape_of(match["op"])[-1])):
            return "dataflow does not show which of its rows make queries, keys and values"
        return read_elsewhere(match, view, ("weight", "bias")) or super().check(site)

    def decide(self, site: Site) -> dict[str, Any]:
        view = site.probe.view
        match = self.match(site, view)
        own = view.site_of(match["op"])
        held = {name: str(match[name].target) for name in ("weight", "bias") if name in match}
        parts = {name: _runs(rows) for name, rows in own.parts.items()}
        return {"reads": held, "shape": list(own.shape), "layout": own.layout, "parts": parts}

    def outcome(self, site: Site) -> Outcome:
        note = ", ".join(f"{name} of {len(_rows(runs))}" for name, runs in site.decided["parts"].items())
        return Outcome(note=note, unused=frozenset(site.decided["reads"].values()))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        shape, axis_of_rows = list(site.decided["shape"]), site.decided["layout"].index("o")
        specs = {}
        for part, runs in site.decided["parts"].items():
            rows = _rows(runs)
            shape[axis_of_rows] = len(rows)
            specs[f"{part}.weight"] = TensorSpec(tuple(shape), self._filled(site, "weight", rows))
            if "bias" in site.decided["reads"]:
                specs[f"{part}.bias"] = TensorSpec((len(rows),), self._filled(site, "bias", rows))
        order = _order(site)
        if order is not None:
            value = torch.tensor(order)
            specs["order"] = TensorSpec((len(order),), trainable=False, dtype=torch.int64, value=value)
        return specs

    def _filled(self, site: Site, what: str, rows: list[int]) -> Callable[[Tensor], Any]:
        along = site.decided["layout"].index("o") if what == "weight" else 0
        name = site.decided["reads"][what]

        def fill(tensor: Tensor) -> None:
            old = site.probe.tensor(name)
            tensor.copy_(old.index_select(along, torch.tensor(rows, device=old.device)))

        return fill

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        owner = str(site.decided["reads"]["weight"]).rpartition(".")[0]
        return {name: f"{owner}.{attribute_of(self)}.{name}".lstrip(".") for name in tensors}

    def replacement(self, site: Site, match: Match, g: Rewriter) -> Sequence[fx.Node]:
        made = [self._part(match, part, g) for part in site.decided["parts"]]
        if match.pattern.name == _THIRDS:
            return [_seen(match, node, g) for node in made]
        # The model reads one output in the old order of rows, for example interleaved by heads.
        order = _order(site)
        both = g.model_op(aten.cat.default, made, -1)
        return [both if order is None else g.model_op(aten.index_select.default, both, -1, g["order"])]

    def _part(self, match: Match, part: str, g: Rewriter) -> fx.Node:
        weight = g[f"{part}.weight"]
        bias = g[f"{part}.bias"] if f"{part}.bias" in g.tensors else None
        op = match["op"].target
        args = (bias, match["x"], weight) if op is aten.addmm.default else (match["x"], weight, bias)
        made = g.model_op(op, *args)
        g.set_role(made, f"attn.{part}")
        return made


def _seen(match: Match, node: fx.Node, g: Rewriter) -> fx.Node:
    """Reshape a part as the model reshapes the whole product, if it does: the same sizes except the last."""
    view = match.get("view")
    if view is None:
        return node
    return g.model_op(view.target, node, [*view.args[1][:-1], shape_of(node)[-1]])


def _fused(view: View) -> tuple[Op, Op]:
    """Build patterns of a fused projection: aten.linear, and aten.addmm with the bias as first argument."""

    def makes_several(made: Op) -> Op:
        return made.named("op").where(lambda node: role_in(view, node) in _FUSED, "a fused projection")

    x, weight = value("x"), stored("weight")
    plain = ops.linear(x, weight, any_of(stored("bias"), None))
    return makes_several(plain), makes_several(ops.addmm(stored("bias"), x, weight))


def _in_thirds(view: View) -> Pattern:
    """Build a pattern of a fused projection that the model splits into three consecutive pieces."""

    def in_order(match: Match) -> str | None:
        """Return None if the pieces are exactly the parts q, k and v, in this order."""
        # When a journal is replayed the op may be superseded already; it was checked when the pass was planned.
        if is_superseded(match["op"]):
            return None
        found = [row for rows in view.site_of(match["op"]).parts.values() for row in rows]
        sizes = [shape_of(output)[-1] for output in match.outputs]
        same = [len(rows) for rows in view.site_of(match["op"]).parts.values()] == sizes
        return (
            None
            if same and found == list(range(sum(sizes)))
            else "its pieces are not queries, keys and values, in this order"
        )

    whole = any_of(*_fused(view))
    seen = any_of(ops["view", "reshape"](whole, ...).named("view"), whole)
    pieces = ops["split", "split_with_sizes", "chunk"](seen, ..., axis(-1)).anchor()
    return Pattern(_THIRDS, tuple(ops.getitem(pieces, number) for number in range(3)), in_order)


def _whole(view: View) -> list[Pattern]:
    """Build patterns of a fused projection by itself, however the model uses its output."""
    return [Pattern("whole", (form,)) for form in _fused(view)]


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """Compress row indices into runs of consecutive ones, each as [first, last + 1]."""
    groups = [[row for _, row in run] for _, run in groupby(enumerate(rows), lambda pair: pair[1] - pair[0])]
    return [[run[0], run[-1] + 1] for run in groups]


def _rows(runs: Sequence[Sequence[int]]) -> list[int]:
    return [row for first, last in runs for row in range(first, last)]


def _order(site: Site) -> list[int] | None:
    """Map each row of the fused weight to its index in the concatenated parts; None if the order is the same."""
    rows = [row for runs in site.decided["parts"].values() for row in _rows(runs)]
    places = sorted(range(len(rows)), key=rows.__getitem__)
    return None if places == list(range(len(rows))) else places
