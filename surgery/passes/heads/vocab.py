"""vocab: adds rows for new tokens to the embedding and to its output layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.base import GraphPass, attribute_of
from surgery.engine.contract.effect import ADAPTER, Effect
from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.folds import Fold, Stage
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.fake import MetaCache
from surgery.graph.marks import (
    adapters_around,
    input_before_adapters,
    mark_of,
    output_with_adapters,
    set_mark,
)
from surgery.graph.ops import EMBEDDING, LINEAR, Call, operand
from surgery.graph.outputs import follow
from surgery.graph.rewrite.current import read_elsewhere
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.targets import select_sites
from surgery.graph.view import View
from surgery.passes.algebra import packed
from surgery.passes.heads.features import scores_of

aten = torch.ops.aten
_NORMALISES = ("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax")


class Vocab(GraphPass):
    """Vocabulary growth: the embedding E (V × d) gets T new rows R (T × d), for the token ids V … V+T−1.

    A lookup becomes E[i] for i < V, and R[i−V] for new ids. An output layer y = x Eᵀ + b becomes [y, x Rᵀ + c], so the
    logits of new tokens follow those of old ones. E is not copied, the results for old ids stay bit-identical, and R
    trains while E is frozen. A tied output layer reads the same R, as does a tied decoder embedding (T5). An untied
    output layer with V rows gets new rows of its own. An output layer is refused if an op after it depends on V (a
    slice, an added bias tensor) or normalizes the logits (a softmax); the message names the op.

    The first new id is V, the number of rows of E, which can be larger than the tokenizer's vocabulary. New rows start
    at the mean of the old ones, so that new tokens take probability from no token in particular (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models"); `--init` offers the mean with noise of the same
    covariance, normal values with standard deviation 0.02, and zero. LoRA on the same embedding or output layer, before
    or after, adapts the rows of E only. If an op of a plugin stores E packed, its codes are kept, and R is
    floating-point.

    Merge: E becomes [E; R] and b becomes [b; c] in the original graph, under the old names and with the old ties, and
    `--format hf` writes a model with the larger vocabulary. Adapters on the rows of E are merged first. R is not merged
    if one of them cannot be merged, or if an op that reads E was not extended.
    """

    name: ClassVar[str] = "vocab"
    example: ClassVar[str] = "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass vocab --tokens 8 -o longer/"
    on: ClassVar[tuple[str, ...]] = (EMBEDDING, LINEAR)

    tokens: int = Field(default=0, ge=0, description="number of new tokens")
    multiple_of: int = Field(
        default=1, gt=0, description="round the total number of rows up to a multiple of this (64 suits GPUs)"
    )
    init: Literal["mean", "mean-noise", "normal", "zero"] = Field(
        default="mean",
        description="initial new rows: the mean of the old ones, that with noise, normal, or zero",
    )
    noise: float = Field(
        default=0.01,
        gt=0,
        description="mean-noise: standard deviation of the noise, as a fraction of that of the old rows",
    )
    output_layer: Literal["auto", "on", "off"] = Field(
        default="auto", description="extend the output layer too (auto: if it is tied, or has as many rows)"
    )

    @property
    def effect(self) -> Effect:
        return replace(ADAPTER, attaches=False, independent=True, one_layer=False)

    @property
    def expectations(self) -> Expectations:
        return Expectations(adds_outputs=True, reach=self._with_new_ids)

    # -- sites

    def candidates(self, view: View) -> list[Site]:
        embeddings = [s for s in view.sites if s.role == "embed.token" and s.kind == EMBEDDING and s.weight]
        found: list[Site] = []
        for site in embeddings:
            if any(site.key == known.key for known in found):
                continue
            same = {str(site.weight), *site.tied}
            outputs = [] if self.output_layer == "off" else _outputs(view, site, same)
            if self.output_layer == "on" and not outputs:
                raise PassError(
                    f"pass 'vocab': no output layer has {site.in_features} rows, as {site.path} has; leave out "
                    f"--output-layer on"
                )
            # Tied sites are kept together, since a merge makes one tensor longer for all of them.
            uses = [s for s in view.sites if s.weight in same and s.kind == EMBEDDING] + outputs
            found += [_sharing(s, site.path if s.weight in same else s.path, uses) for s in uses]
        return found

    def find(self, view: View) -> list[Site]:
        found = self.candidates(view)
        if not found:
            raise PassError(
                "pass 'vocab': this model has no token embedding (an embedding indexed by an input of token ids), so "
                "there is no vocabulary to extend"
            )
        asked = self.target or self.default_target
        if asked is not None:
            return select_sites(found, asked)
        tables = list(dict.fromkeys(s.decided["table"] for s in found if s.kind == EMBEDDING))
        if len(tables) > 1:
            raise PassError(
                f"pass 'vocab': the model has {len(tables)} token embeddings ({', '.join(tables)}); name one with "
                f"--target, together with its output layer"
            )
        # Without a target, a refused output layer is an error: it must not be left out silently.
        for site in found:
            refusal = self.check(site)
            if refusal is not None:
                raise PassError(f"pass 'vocab' at {site.path}: refused, {refusal}")
        return found

    def check(self, site: Site) -> str | None:
        if not site.float_dtype.is_floating_point:
            return (
                f"its weight is {site.dtype}, and no op dequantizes it; new rows need a floating-point weight"
            )
        if site.packed and self.init.startswith("mean") and (unread := packed.refusal(site)):
            return f"{unread}; use --init normal or zero, which do not read it"
        if site.kind == LINEAR and any(call.x_axis == "column" for call in site.calls):
            return "it computes W @ x, and only x Wᵀ can grow; extend the embedding alone with --output-layer off"
        if not self._more(site):
            return f"it has {_rows(site)} rows, and none would be added; give --tokens"
        if site.kind == EMBEDDING:
            return None
        cache = MetaCache(site.calls[0].node.graph)
        try:
            for call in site.calls:
                place = scores_of(call)[0]
                behind = follow(place.graph, {place: _longer(place, self._more(site), cache)}, cache)
                norms = [node for node in behind if op_name(node.target) in _NORMALISES]
                if norms:
                    return (
                        f"the model normalizes its logits (op {op_name(norms[0].target)}), so new tokens would change "
                        f"the results for old ones; extend the embedding alone with --output-layer off"
                    )
        except PassError as error:
            return f"{error}; the vocabulary has {_rows(site)} rows; extend the embedding alone with --output-layer off"
        return None

    def _more(self, site: Site) -> int:
        """Return the number of rows to add."""
        total = _rows(site) + self.tokens
        return -(-total // self.multiple_of) * self.multiple_of - _rows(site)

    # -- tensors

    def decide(self, site: Site) -> dict[str, Any]:
        decided = {**site.decided, "first": _rows(site), "rows": self._more(site)}
        if site.kind == LINEAR and any(scores_of(c)[1] is not None for c in site.calls):
            decided["behind"] = True  # a separate bias tensor is added after the layer
        return decided

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        table = site.decided["table"]
        # If the table is a bare parameter, its name cannot be a module with the rows as an attribute.
        joint = "_" if table in (site.weight, *site.tied) else "."
        own = {"rows": f"{table}{joint}{attribute_of(self)}.rows"}
        return {name: own.get(name, full) for name, full in super().names(site, tensors).items()}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        rows = site.decided["rows"]
        width = site.out_features if site.kind == EMBEDDING else site.in_features
        # A table and the layer that is tied to it get the same rows.
        specs = {"rows": TensorSpec((rows, width), self._filled(site), shared=True)}
        if site.kind == LINEAR and (site.bias is not None or site.bias_is_computed):
            specs["bias"] = TensorSpec((rows,), self._filled_bias(site))
        return specs

    def _filled(self, site: Site) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            if self.init in ("normal", "zero"):
                tensor.normal_(0, 0.02) if self.init == "normal" else tensor.zero_()
                return
            weight = site.probe.dequantized(site)
            old = (weight.t() if site.kind == LINEAR and site.layout == "io" else weight).float()
            mean = old.mean(0)
            tensor.copy_(mean.expand_as(tensor))
            if self.init == "mean-noise":
                # One row at a time, because z has as many values as the table has rows.
                for row in tensor:
                    z = torch.randn(old.shape[0]).to(old.device)
                    row.add_((z @ old - z.sum() * mean) * (self.noise / old.shape[0] ** 0.5))

        return fill

    def _filled_bias(self, site: Site) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            tensor.zero_()
            if self.init.startswith("mean") and site.bias is not None:
                tensor.fill_(float(site.probe.tensor(site.bias).float().mean()))

        return fill

    # -- graph

    def rewrite(self, site: Site, g: Rewriter) -> None:
        if site.decided["first"] != _rows(site):
            raise PassError(
                f"vocab at {site.path}: the table has {_rows(site)} rows, not {site.decided['first']}"
            )
        for call in site.calls:
            with g.at_call(call):
                if site.kind == EMBEDDING:
                    _look_up(g, call, site.decided["first"])
                else:
                    _score(g, call, "bias" in g.tensors)

    def _with_new_ids(self, site: Site, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs with ids of new tokens in some of the columns that have only old ids."""
        changed = dict(inputs)
        name = _placeholder(site) if site.kind == EMBEDDING else None
        if name is None or name not in changed:
            return changed
        ids = changed[name].clone()
        columns = [c for c in range(ids.shape[-1]) if bool((ids[..., c] < site.in_features).all())]
        inner = columns[1:-1:2] or columns[:1]
        for position, column in enumerate(inner):
            ids[..., column] = site.decided["first"] + position % site.decided["rows"]
        changed[name] = ids
        return changed

    def why_not_merged(self, site: Site) -> str | None:
        if site.decided.get("elsewhere"):
            return (
                "another op reads its weight and expects the old number of rows; export, or save the program"
            )
        if site.decided.get("behind"):
            return "the base adds a separate bias tensor to its logits, which cannot grow; export, or save the program"
        return None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        axis = 0 if site.kind == EMBEDDING else site.layout.index("o")
        merged = {"weight": _Longer(tensors["rows"].t() if axis else tensors["rows"], axis)}
        if "bias" in tensors:
            merged["bias"] = _Longer(tensors["bias"], 0)
        return merged


@dataclass(frozen=True)
class _Longer(Fold):
    """Merge: W ← [W; R] along the axis of tokens."""

    stage: ClassVar[Stage] = Stage.SIZE
    keeps_zeros: ClassVar[bool] = True

    rows: Tensor
    axis: int

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        return torch.cat([weight, self.rows.detach().to(weight.dtype)], self.axis)


def _outputs(view: View, site: Site, same: set[str]) -> list[Site]:
    """Return the output layers of an embedding: those tied to it, else the heads with as many rows."""
    linears = [s for s in view.sites if s.kind == LINEAR and s.weight]
    tied = [s for s in linears if s.weight in same]
    return tied or [s for s in linears if s.role == "head" and _rows(s) == _rows(site)]


def _sharing(site: Site, table: str, uses: list[Site]) -> Site:
    """Return the site with the path of its table, and a flag if an op outside `uses` reads the table too."""
    calls = tuple(c for s in uses if s.weight == site.weight or s.weight in site.tied for c in s.calls)
    elsewhere = read_elsewhere(replace(site, calls=calls), str(site.weight), site.tied)
    return site.deciding({"table": table, **({"elsewhere": True} if elsewhere else {})})


def _rows(site: Site) -> int:
    """Return the current number of rows at a site, including rows that earlier passes added."""
    if site.kind == EMBEDDING:
        grown = adapters_around(site.calls[0].node, whole=True)
        return site.in_features + sum(mark_of(node).rows for node in grown)
    return int(output_with_adapters(site.calls[0].node, whole=True).meta["val"].shape[-1])


def _longer(node: fx.Node, more: int, cache: MetaCache) -> Any:
    """Return a fake tensor like the node's value, with more logits."""
    val = node.meta["val"]
    with cache.mode:
        return val.new_empty([*val.shape[:-1], val.shape[-1] + more])


def _look_up(g: Rewriter, call: Call, first: int) -> None:
    """Insert the lookup of new ids around an embedding.

    Args:
        g: The rewriter, at the call.
        call: The embedding.
        first: The first new id.
    """
    ids = input_before_adapters(operand(call), whole=True)
    g.replace_input(lambda x: g.call(aten.clamp_max.default, x, first - 1), grown=True)

    def build(old: fx.Node) -> fx.Node:
        # An id beyond the last new one is out of range here, so it raises as in the embedding itself.
        index = g.call(aten.clamp_min.default, g.call(aten.sub.Tensor, ids, first), 0)
        new = g.call(aten.embedding.default, g["rows"], index)
        if new.meta["val"].dtype != old.meta["val"].dtype:
            new = g.call(aten.to.dtype, new, old.meta["val"].dtype)
        known = g.call(aten.unsqueeze.default, g.call(aten.lt.Scalar, ids, first), -1)
        return g.call(aten.where.self, known, old, new)

    value = g.wrap(call.node, build, grown=True)
    set_mark(value, rows=int(g.tensors["rows"].shape[0]))


def _score(g: Rewriter, call: Call, biased: bool) -> None:
    """Append the logits of new tokens to those of an output layer."""
    place, _ = scores_of(call)

    def build(old: fx.Node) -> fx.Node:
        rows, bias = g["rows"], g["bias"] if biased else None
        wanted = old.meta["val"].dtype
        x = g.x
        if rows.meta["val"].dtype != x.meta["val"].dtype:
            rows = g.call(aten.to.dtype, rows, x.meta["val"].dtype)
        new = g.call(aten.linear.default, x, rows, bias)
        if new.meta["val"].dtype != wanted:
            new = g.call(aten.to.dtype, new, wanted)
        return g.call(aten.cat.default, [old, new], -1)

    more = int(g.tensors["rows"].shape[0])
    behind = g.follow({place: _longer(place, more, g.cache)})
    behind.pop(place)
    g.wrap(place, build, grown=True)
    g.refresh(behind)


def _placeholder(site: Site) -> str | None:
    """Return the name of the input that an embedding is indexed by, or None if the index is computed."""
    node: Any = site.calls[0].x
    while isinstance(node, fx.Node) and node.op == "call_function":
        node = node.args[0] if node.args else None
    return node.name if isinstance(node, fx.Node) and node.op == "placeholder" else None
