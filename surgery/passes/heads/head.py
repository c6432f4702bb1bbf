"""head: replaces or resizes the classifier or regressor, or adds another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from surgery.common.errors import PassError
from surgery.engine.contract.base import GraphPass
from surgery.engine.contract.effect import ADAPTER, Effect
from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.numerics import EXACT, Numerics, changes
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.fake import MetaCache
from surgery.graph.marks import input_before_adapters, mark_of, output_with_adapters
from surgery.graph.ops import CONV, LINEAR, Call, arguments, operand
from surgery.graph.outputs import follow, refuse_output
from surgery.graph.rewrite.current import adapted_by, read_elsewhere, tensors_now
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes.algebra import packed
from surgery.passes.heads import features as pooling

aten = torch.ops.aten


class Head(GraphPass):
    """Head: replaces the classifier or regressor, changes its number of outputs, or adds another one beside it.

    A head is the linear layer or 1×1 convolution that computes an output of the model (role `head`): the classifier of
    sequences, tokens or pixels, or the output layer of a language model. Its new weight W' (labels × in) and bias train
    while the base is frozen, and later passes can target them.

    `--mode replace` creates a new head instead of the old one. `--mode resize` does the same, and copies the rows of W
    and b of the classes that are kept, bit for bit: the first ones, or those of --keep. The logits of these classes
    stay the same up to the summation order in a product of another width. In both modes the old weight is no longer
    run, counted or exported, and `undo` restores it. A new number of outputs is refused if an op after the head depends
    on the old one (a slice, a view); the message names the op.

    `--mode add` leaves the old head as it is and adds a further, named output (multi-task learning: Caruana 1997). The
    new head reads the input of the existing one. With --pool it reads the tokens from which that input was pooled:
    `cls` takes the first token, `mean` and `last` use only tokens that the attention mask does not hide (with padding
    on either side), `none` scores each token. Features of images are averaged by `mean`. In a model without a head, the
    new head reads the pooled output, or with --pool the hidden states. The new output is called `logits_NAME`. It is a
    new key if the model returns a dict, and the last item if it returns a tuple. If the model returns a tensor, the
    program returns a dict of `output` and `logits_NAME`. The outputs that the program had before do not change.

    There is no merged form, because the base has no weight of the new shape.
    """

    name: ClassVar[str] = "head"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass head "
        "--labels 5 -o five/"
    )

    mode: Literal["replace", "resize", "add"] = Field(
        default="replace",
        description="replace: a new head instead of the old one; resize: the same, but keep rows of old classes; "
        "add: a second head with an output of its own",
    )
    labels: int | None = Field(default=None, gt=0, le=2**20, description="number of outputs of the head")
    keep: str | None = Field(
        default=None,
        description="resize: numbers of the old classes to keep, such as 0,2,5 (default: the first ones)",
    )
    head_name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_]*$",
        max_length=100,
        description="add: name of the head; its output is logits_NAME",
    )
    pool: Literal["cls", "mean", "last", "none"] | None = Field(
        default=None,
        description="add: how tokens are reduced to one feature vector (none: scores for each token; default: read the "
        "input of the existing head)",
    )
    init: Literal["normal", "kaiming", "zero"] = Field(
        default="normal",
        description="initial new weights: normal (standard deviation 0.02), kaiming (uniform) or zero",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Head:
        add = self.mode == "add"
        if self.labels is None and not (self.mode == "resize" and self.keep):
            raise PassError("pass 'head': give --labels, the number of outputs")
        if add and not (self.head_name or self.label):
            raise PassError("pass 'head': --mode add needs --head-name; the output is called logits_NAME")
        for option, given, mode in (
            ("--keep", self.keep, "resize"),
            ("--head-name", self.head_name, "add"),
            ("--pool", self.pool, "add"),
        ):
            if given and self.mode != mode:
                raise PassError(
                    f"pass 'head': {option} is for --mode {mode}, and this is --mode {self.mode}; leave it out"
                )
        kept = self._kept()
        if kept is not None and (len(set(kept)) < len(kept) or len(kept) > (self.labels or len(kept))):
            raise PassError(
                f"pass 'head': --keep {self.keep} names a class twice, or more classes than --labels {self.labels}"
            )
        return self

    def _kept(self) -> list[int] | None:
        """Return the class numbers of --keep, or None if it is not given."""
        if self.keep is None:
            return None
        try:
            found = [int(part) for part in self.keep.split(",")]
        except ValueError:
            found = [-1]
        if min(found) < 0:
            raise PassError(
                f"pass 'head': --keep {self.keep!r} is not a list of class numbers; write it as 0,2,5"
            )
        return found

    # -- names and contract

    @property
    def _title(self) -> str:
        return "_".join(dict.fromkeys(part for part in (self.head_name, self.label) if part))

    @property
    def entry_id(self) -> str:
        label = self.label or self.head_name
        return f"{self.name}:{label}" if label else self.name

    @property
    def output(self) -> str:
        """Name of the output that `--mode add` adds."""
        return f"logits_{self._title}"

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        if self.mode != "add":
            return super().names(site, tensors)
        return {name: f"{self.name}_{self._title}.{name}" for name in tensors}

    @property
    def numerics(self) -> Numerics:
        done = {"replace": "is replaced", "resize": "has other outputs"}
        return EXACT if self.mode == "add" else changes(f"the head {done[self.mode]}")

    @property
    def effect(self) -> Effect:
        return replace(
            ADAPTER,
            attaches=False,
            adds_weights=True,
            independent=True,
            one_layer=False,
            comes_first=self.mode != "add",
        )

    @property
    def expectations(self) -> Expectations:
        return Expectations(adds_outputs=self.mode == "add")

    # -- sites

    def candidates(self, view: View) -> list[Site]:
        if self.mode == "add":
            return [f.site.deciding({"source": f.source}) for f in pooling.find_features(view, self.pool)]
        return pooling.head_sites(view)

    def find(self, view: View) -> list[Site]:
        if self.target is not None:
            found = super().find(view)
            if self.mode == "add" and len(found) > 1:
                raise PassError(
                    f"pass 'head': --mode add adds one head, and the target names {len(found)} places; name one of them"
                )
            return found
        if self.mode == "add":
            heads = self.candidates(view)
            # Several heads that read the same features are one place to add another.
            reads = {input_before_adapters(operand(site.calls[-1])) for site in heads}
            if len(reads) == 1:
                return heads[:1]
        else:
            heads = pooling.head_sites(view, added=False) or pooling.head_sites(view)
        if not heads:
            raise PassError(
                "pass 'head': this model has no head (a layer that computes an output); use --mode add"
            )
        if len(heads) > 1:
            paths = ", ".join(site.path for site in heads)
            raise PassError(f"pass 'head': the model has {len(heads)} heads; name one with --target: {paths}")
        return heads

    def check(self, site: Site) -> str | None:
        if self.mode == "add":
            return self._check_add(site)
        if site.kind not in (LINEAR, CONV) or any(call.x_axis == "column" for call in site.calls):
            return "only a linear layer of the form x Wᵀ or a 1×1 convolution can be replaced; use --mode add"
        if site.packed and site.kind == CONV:
            return f"its weight is packed for {site.op}, and a packed convolution cannot be replaced; use --mode add"
        if site.groups > 1:
            return f"it is a convolution of {site.groups} groups, so its outputs read different inputs; use --mode add"
        adapter = next((a for a in map(_adapter, site.calls) if a), None)
        if adapter:
            return f"{adapter!r} is attached to it and would be lost; undo that, or apply head before it"
        standing = tensors_now(site)
        if isinstance(standing, str):
            return standing
        if self.mode == "resize":
            if site.packed and (unread := packed.refusal(site)):
                return f"{unread}, so its rows cannot be kept; use --mode replace"
            beyond = [number for number in self._kept() or () if number >= site.out_features]
            if beyond:
                return f"it has no class {beyond[0]}; give classes from 0 to {site.out_features - 1}"
        return self._check_width(site)

    def _check_add(self, site: Site) -> str | None:
        graph = site.calls[0].node.graph
        node = pooling.features_of(graph, site, site.decided["source"])
        try:
            node = pooling.unpooled(node) if self.pool not in (None, "none") else node
        except PassError as error:
            return str(error)
        return refuse_output(graph, self.output) or pooling.refuse_pool(node, self.pool)

    def _check_width(self, site: Site) -> str | None:
        """Return the reason why ops after the head cannot take another number of outputs, or None."""
        labels = len(self._rows(site))
        if labels == site.out_features:
            return None
        cache = MetaCache(site.calls[0].node.graph)
        try:
            for call in site.calls:
                scores, _ = pooling.scores_of(call)
                follow(scores.graph, {scores: _widened(site, scores, labels, cache)}, cache)
        except PassError as error:
            return (
                f"{error}; it has {site.out_features} outputs and would get {labels}: keep --labels "
                f"{site.out_features}, or use --mode add"
            )
        return None

    # -- tensors

    def _rows(self, site: Site) -> list[int | None]:
        """Return the old class of each output, or None for a new one."""
        kept = self._kept()
        if self.mode != "resize":
            kept = []
        elif kept is None:
            kept = list(range(min(site.out_features, self.labels or 0)))
        return [*kept, *[None] * ((self.labels or len(kept)) - len(kept))]

    def decide(self, site: Site) -> dict[str, Any]:
        if self.mode == "add":
            source = site.decided["source"]
            node = pooling.features_of(site.calls[0].node.graph, site, source)
            if self.pool not in (None, "none"):
                node = pooling.unpooled(node)
            val = node.meta["val"]
            pixels = val.dim() == 4 and self.pool in (None, "none")
            width = int(val.shape[1] if val.dim() == 4 else val.shape[-1])
            return {
                "source": source,
                "shape": [self.labels, width, 1, 1] if pixels else [self.labels, width],
                "dtype": str(val.dtype).removeprefix("torch."),
                "bias": True,
            }
        rows = self._rows(site)
        decided: dict[str, Any] = {
            "shape": [len(rows), site.in_features, *(site.float_shape[2:] if site.kind == CONV else ())],
            "dtype": str(site.float_dtype).removeprefix("torch."),
            "bias": site.bias is not None or site.bias_is_computed or self._bias_behind(site) is not None,
        }
        if self.mode == "resize":
            decided["classes"] = rows
        return decided

    def outcome(self, site: Site) -> Outcome:
        """Parameters that only the old head reads stop training, because they no longer get gradients."""
        names = () if self.mode == "add" or site.tied else (site.weight, site.bias)
        alone = (name for name in names if name is not None and not read_elsewhere(site, name))
        return Outcome(trains=dict.fromkeys(alone, False))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        shape, dtype = tuple(site.decided["shape"]), getattr(torch, site.decided["dtype"])
        specs = {"weight": TensorSpec(shape, self._filled(site, "weight"), dtype=dtype)}
        if site.decided["bias"]:
            specs["bias"] = TensorSpec(shape[:1], self._filled(site, "bias"), dtype=dtype)
        return specs

    def _filled(self, site: Site, name: str) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            if name == "weight":
                self._start(tensor)
            else:
                nn.init.zeros_(tensor)
            rows = site.decided.get("classes") or ()
            places = [i for i, row in enumerate(rows) if row is not None]
            if places:
                old = self._old(site, name)
                if old is not None:
                    tensor[places] = old[[rows[i] for i in places]].to(tensor)

        return fill

    def _start(self, tensor: Tensor) -> None:
        if self.init == "normal":
            nn.init.normal_(tensor, std=0.02)
        elif self.init == "kaiming":
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        else:
            nn.init.zeros_(tensor)

    def _old(self, site: Site, name: str) -> Tensor | None:
        """Return the old head's weight (labels × in), or the sum of its bias and a separate bias added after it."""
        standing = tensors_now(site)
        assert not isinstance(standing, str)
        if name == "weight":
            weight = site.probe.dequantized(site) if site.packed else site.probe.tensor(standing[0])
            return weight.t() if site.layout == "io" else weight
        behind = self._bias_behind(site)
        parts = [site.probe.tensor(n).reshape(-1) for n in (standing[1], behind) if n is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def _bias_behind(self, site: Site) -> str | None:
        """Return the name of a separate bias tensor that is added to the head's output, or None."""
        _, bias = pooling.scores_of(site.calls[0])
        return str(bias.target) if bias is not None else None

    # -- graph

    def rewrite(self, site: Site, g: Rewriter) -> None:
        bias = g["bias"] if site.decided["bias"] else None
        if self.mode == "add":
            self._add(site, g, bias)
            return
        for call in site.calls:
            with g.at_call(call):
                fresh = _apply(g, call, g["weight"], bias)
            old, _ = pooling.scores_of(call)
            # Sizes after the head are computed before the op is replaced, while the old sizes are still in the graph.
            behind = g.follow({old: fresh.meta["val"]}) if _differs(call, old, fresh) else {}
            behind.pop(old, None)
            g.supersede(call.node, fresh, old)
            g.refresh(behind)

    def _add(self, site: Site, g: Rewriter, bias: fx.Node | None) -> None:
        node = pooling.features_of(g.graph, site, site.decided["source"])
        pool = None if self.pool in (None, "none") else self.pool
        node = pooling.unpooled(node) if pool else node
        with g.after(node):
            features = pooling.pooled(g, node, pool) if pool else node
            if len(site.decided["shape"]) == 4:
                logits = g.model_op(aten.conv2d.default, features, g["weight"], bias)
            else:
                logits = g.model_op(aten.linear.default, features, g["weight"], bias)
        g.add_output(self.output, logits)

    def why_not_merged(self, site: Site) -> str | None:
        if self.mode == "add":
            return "the base has no weight that an added head could be merged into; export to ONNX, or save the program"
        return "a new head has tensors of its own, which do not fit the base's; export to ONNX, or save the program"


def _apply(g: Rewriter, call: Call, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """Insert the head's op with other tensors."""
    x = g.x
    if call.kind == CONV:
        rest = [arguments(call.node)[name] for name in ("stride", "padding", "dilation")]
        return g.model_op(call.node.target, x, weight, bias, *rest)
    return g.model_op(aten.linear.default, x, weight, bias)


def _adapter(call: Call) -> str | None:
    """Return the id of an entry that changes the input or output of a call, or None."""
    outer = output_with_adapters(call.node, whole=True)
    return adapted_by(call) or (mark_of(outer).entry if outer is not call.node else None)


def _differs(call: Call, old: fx.Node, fresh: fx.Node) -> bool:
    """True if the new head has another number of outputs."""
    axis = 1 if call.kind == CONV else -1
    return bool(fresh.meta["val"].shape[axis] != old.meta["val"].shape[axis])


def _widened(site: Site, scores: fx.Node, labels: int, cache: MetaCache) -> Any:
    """Return a fake tensor like the scores, with another number of labels."""
    val = scores.meta["val"]
    shape = list(val.shape)
    shape[1 if site.kind == CONV else -1] = labels
    with cache.mode:
        return val.new_empty(shape)
