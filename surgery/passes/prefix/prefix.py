"""Prefix tuning: learned keys and values that every attention reads before its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from surgery.capture.shapes import list_axes
from surgery.common.errors import PassError
from surgery.engine.contract.base import GraphPass, Simplify
from surgery.engine.contract.effect import Effect
from surgery.engine.contract.numerics import EXACT, Numerics, changes
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.propagate.sizes import same
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes import prefix
from surgery.passes.prefix import Place, Unsuited, gate, positions, start

aten = torch.ops.aten


class Prefix(GraphPass):
    """Prefix tuning: attention over [P_k; K] and [P_v; V] instead of K and V (Li & Liang 2021, arXiv:2101.00190).

    P_k and P_v (heads × tokens × width) are parameters of every attention: self, cross, causal or masked, written as
    scaled_dot_product_attention or as products around a softmax. Masks get visible columns for the prefix, and biases
    of the scores get zeros. With grouped queries there is one prefix per key head, inserted after rotary embedding, as
    in PEFT's shapes. A module that is called several times has a prefix for each call. Every query sees the prefix,
    regardless of mask, window and padding.

    projection: P = W₂ tanh(W₁ E + b₁) + b₂ as in the paper. E (tokens × width) and W₁ (hidden × width) are shared by
    all attentions and stored at the first one; each attention has its own W₂ (2·heads·width × hidden). A merge computes
    P once and drops the MLP. The prefix itself stays, because no weight of the base can represent it.

    gate: the prefix has its own softmax, scaled by tanh(g) for each head, with g = 0 at first (LLaMA-Adapter, Zhang et
    al. 2023, arXiv:2303.16199). Insertion is then exact, and the pass can be weighted.
    """

    name: ClassVar[str] = "prefix"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass prefix --tokens 16 -o adapted/"
    )

    tokens: int = Field(default=10, gt=0, description="number of learned keys and values of each attention")
    over: Literal["all", "self", "cross"] = Field(
        default="all", description="kind of attention, among those targeted"
    )
    projection: bool = Field(
        default=False,
        description="compute keys and values by an MLP from an embedding; a merge folds it away",
    )
    hidden: int | None = Field(
        default=None,
        gt=0,
        description="with --projection: hidden size of the MLP (default: that of the embedding)",
    )
    init: Literal["normal", "zero", "activations"] = Field(
        default="normal",
        description="standard normal; zero; or the keys and values of tokens in the data (the example inputs)",
    )
    positions: Literal["keep", "shift"] = Field(
        default="keep",
        description="shift: count real tokens from --tokens on, as after a cache (as in PEFT)",
    )
    gate: bool = Field(
        default=False, description="scale the prefix by a gate that starts at zero; insertion is then exact"
    )

    @property
    def numerics(self) -> Numerics:
        if self.gate:
            return EXACT
        return changes(f"every query attends to {self.tokens} learned keys and values")

    @property
    def effect(self) -> Effect:
        return replace(super().effect, independent=True, scalable=self.gate)

    @property
    def simplify(self) -> Simplify | None:
        return self._without_projection if self.projection else None

    # -- where

    def candidates(self, view: View) -> list[Site]:
        found = prefix.attentions_by_site(view)
        wanted = {key for key, group in found.items() if any(self._wants(a) for a in group)}
        return [site for site in view.sites if site.key in wanted]

    def _wants(self, attention: Any) -> bool:
        return self.over == "all" or attention.cross == (self.over == "cross")

    def find(self, view: View) -> list[Site]:
        found = super().find(view)
        if not found:
            kind = "" if self.over == "all" else f"{self.over}-"
            raise PassError(f"prefix: the program has no {kind}attention for learned keys and values")
        return found

    def _places(self, view: View, site: Site) -> list[Place]:
        """Return the attentions of a site in their current state.

        Raises:
            Unsuited: if one of them cannot take a prefix.
        """
        group = prefix.attentions_by_site(view).get(site.key, [])
        places = [prefix.read_place(view, a) for a in group if self._wants(a)]
        if self.gate:
            for place in places:
                gate.check(place)
        if self.positions == "shift" and not all(positions.has_source(view, p) for p in places):
            raise Unsuited(
                "its positions are not found by dataflow (rotary angles, or a table of absolute or relative "
                "positions); use --positions keep"
            )
        return places

    def check(self, site: Site) -> str | None:
        if self.hidden is not None and not self.projection:
            return "--hidden is the size of an MLP that is not there; add --projection"
        if self.init == "activations" and self.projection:
            return "the output of an MLP cannot start at given activations; leave out --projection or --init"
        if not site.float_dtype.is_floating_point:
            return f"its weight is {site.dtype}, so the dtype of learned keys is unknown; target other attentions"
        try:
            self._places(site.probe.view, site)
        except Unsuited as reason:
            return str(reason)
        return None

    # -- what

    def decide(self, site: Site) -> dict[str, Any]:
        view = site.probe.view
        places = self._places(view, site)
        shapes = [
            {
                "k": [p.key.heads, p.key.width],
                "v": [p.value.heads, p.value.width],
                "q": gate.query_heads(p),
            }
            for p in places
        ]
        decided: dict[str, Any] = {"attentions": shapes}
        if self.projection:
            # E and W₁ are stored at the first attention that is not refused; every site must find the same one.
            first = next(s for s in self.find(view) if self.check(replace(s, measured=site.probe)) is None)
            decided["first"] = first.key == site.key
            key = shapes[0]["k"]
            decided["width"] = key[0] * key[1]  # type: ignore[index]
        if self.positions == "shift":
            decided["limits"] = self._limits(site, view, places)
        return decided

    def _limits(self, site: Site, view: View, places: Sequence[Place]) -> dict[str, int]:
        """Return the lengths that are left to the inputs: position tables must hold the prefix as well."""
        found: dict[str, int] = {}
        axes = list_axes(site.probe.captured)
        inputs = {n.name: n.meta["val"] for n in view.graph.nodes if n.op == "placeholder"}
        for place in places:
            for rows, length in positions.tables(view, place.attention):
                for axis in axes:
                    value = inputs.get(axis.input)
                    if axis.name == axis.root and value is not None and same(value.shape[axis.axis], length):
                        high = min(rows, axis.high) - self.tokens
                        found[axis.root] = min(high, found.get(axis.root, high))
                if isinstance(length, int) and length + self.tokens > rows:
                    raise PassError(
                        f"prefix at {site.path}: its position table has {rows} rows, but {length} tokens after a "
                        f"prefix of {self.tokens} need more; use --positions keep"
                    )
        return found

    def outcome(self, site: Site) -> Outcome:
        return Outcome(limits=dict(site.decided.get("limits", {})))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        plain = not self.projection or bool(site.decided.get("simplified"))
        if not plain and site.decided["first"]:
            width = int(site.decided["width"])
            hidden = self.hidden or width
            specs["E"] = TensorSpec((self.tokens, width), nn.init.normal_)
            specs["W1"] = TensorSpec((hidden, width), _kaiming)
            specs["b1"] = TensorSpec((hidden,), partial(_uniform, fan=width))
        for number, shape in enumerate(site.decided["attentions"], 1):
            tail = "" if number == 1 else str(number)
            (k_heads, k_width), (v_heads, v_width) = shape["k"], shape["v"]
            if plain:
                fill = partial(self._start, site, number - 1)
                specs[f"K{tail}"] = TensorSpec((k_heads, self.tokens, k_width), partial(fill, "k"))
                specs[f"V{tail}"] = TensorSpec((v_heads, self.tokens, v_width), partial(fill, "v"))
            else:
                rows, hidden = (
                    k_heads * k_width + v_heads * v_width,
                    self.hidden or int(site.decided["width"]),
                )
                zero = self.init == "zero"
                specs[f"W2{tail}"] = TensorSpec((rows, hidden), nn.init.zeros_ if zero else _kaiming)
                specs[f"b2{tail}"] = TensorSpec(
                    (rows,), nn.init.zeros_ if zero else partial(_uniform, fan=hidden)
                )
            if self.gate:
                specs[f"gate{tail}"] = TensorSpec((int(shape["q"]), 1, 1))
        return specs

    def _start(self, site: Site, number: int, letter: str, tensor: Tensor) -> None:
        if self.init == "normal":
            nn.init.normal_(tensor)
        elif self.init == "zero":
            nn.init.zeros_(tensor)
        else:
            place = self._places(site.probe.view, site)[number]
            start.from_activations(site.probe, place.key if letter == "k" else place.value, tensor)

    # -- how

    def rewrite(self, site: Site, g: Rewriter) -> None:
        try:
            places = self._places(g.view, site)
        except Unsuited as reason:
            raise PassError(f"prefix at {site.path}: {reason}") from None
        found = [{"k": [p.key.heads, p.key.width], "v": [p.value.heads, p.value.width]} for p in places]
        decided = site.decided["attentions"]
        if found != [{"k": list(d["k"]), "v": list(d["v"])} for d in decided]:
            raise PassError(
                f"prefix at {site.path}: its attention has other heads in this graph: {found}; undo prefix, and "
                f"apply it again"
            )
        for number, place in enumerate(places, 1):
            tail = "" if number == 1 else str(number)
            with g.before(min(place.core)):
                keys, values = self._prefix(site, g, tail, decided[number - 1])
            if self.positions == "shift":
                positions.shift(g, place.attention, self.tokens)
            if self.gate:
                gate.attend(g, place, keys, values, g[f"gate{tail}"])
            elif self.positions == "shift":
                prefix.attend(g, place, keys, values, positions.columns(g, place, self.tokens))
            else:
                prefix.attend(g, place, keys, values)

    def _prefix(
        self, site: Site, g: Rewriter, tail: str, shape: Mapping[str, Any]
    ) -> tuple[fx.Node, fx.Node]:
        if not self.projection or site.decided.get("simplified"):
            return g[f"K{tail}"], g[f"V{tail}"]
        hidden = g.once("hidden", lambda: self._hidden(g), prefix.root_stack(g.graph))
        both = g.call(aten.linear.default, hidden, g[f"W2{tail}"], g[f"b2{tail}"])
        sizes = [math.prod(shape["k"]), math.prod(shape["v"])]
        keys, values = (
            self._by_heads(g, g.call(aten.slice.Tensor, both, 1, first, last), shape[letter])
            for letter, first, last in (("k", 0, sizes[0]), ("v", sizes[0], sum(sizes)))
        )
        return keys, values

    def _by_heads(self, g: Rewriter, flat: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Reshape (tokens, heads · width) to (heads, tokens, width)."""
        return g.call(aten.transpose.int, g.call(aten.view.default, flat, [self.tokens, *shape]), 0, 1)

    def _hidden(self, g: Rewriter) -> fx.Node:
        with g.before(next(n for n in g.graph.nodes if n.op == "call_function")):
            return g.call(aten.tanh.default, g.call(aten.linear.default, g["E"], g["W1"], g["b1"]))

    def _without_projection(
        self, places: Sequence[tuple[Site, Mapping[str, Tensor]]]
    ) -> list[dict[str, Tensor]]:
        first = next(tensors for _, tensors in places if "E" in tensors)
        hidden = torch.tanh(nn.functional.linear(first["E"], first["W1"], first["b1"]))
        return [self._computed(site, tensors, hidden) for site, tensors in places]

    def _computed(self, site: Site, tensors: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, shape in enumerate(site.decided["attentions"], 1):
            tail = "" if number == 1 else str(number)
            both = nn.functional.linear(hidden, tensors[f"W2{tail}"], tensors[f"b2{tail}"])
            parts = both.split([math.prod(shape["k"]), math.prod(shape["v"])], 1)
            for name, part, sizes in zip("KV", parts, (shape["k"], shape["v"]), strict=True):
                found[f"{name}{tail}"] = part.reshape(self.tokens, *sizes).transpose(0, 1).contiguous()
            if self.gate:
                found[f"gate{tail}"] = tensors[f"gate{tail}"].clone()
        return found


def _kaiming(tensor: Tensor) -> None:
    """Initialize a weight like nn.Linear."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def _uniform(tensor: Tensor, fan: int) -> None:
    """Initialize a bias like nn.Linear."""
    nn.init.uniform_(tensor, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
