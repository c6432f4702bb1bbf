"""Bottleneck adapters: small trained networks on the residual branches of a frozen model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from surgery.common.errors import PassError
from surgery.engine.contract.base import GraphPass
from surgery.engine.contract.effect import Effect
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.marks import output_with_adapters
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra.nonlinearities import ACTIVATIONS

if TYPE_CHECKING:
    from surgery.graph.analysis.branches import Branch
    from surgery.graph.view import View

aten = torch.ops.aten


_ATTENTION, _FEED_FORWARD = ("attention", "cross-attention"), ("feed-forward",)
_KINDS = {
    "houlsby": (*_ATTENTION, *_FEED_FORWARD),
    "pfeiffer": _FEED_FORWARD,
    "parallel": _FEED_FORWARD,
}


def _small(tensor: Tensor) -> None:
    nn.init.normal_(tensor, std=1e-2)


class Adapter(GraphPass):
    """Bottleneck adapters: h becomes h + s·W_up σ(W_down h + b_down) + s·b_up, beside a frozen model.

    h is the result of a residual branch, just before it is added to the stream: after dropout, layer scale and a
    norm within the branch. `houlsby` puts one on every branch, that is after attention and after feed-forward
    (Houlsby et al. 2019, arXiv:1902.00751); `pfeiffer` after feed-forward alone (Pfeiffer et al. 2021,
    arXiv:2005.00247); `parallel` adds to the feed-forward's result what the adapter makes of the feed-forward's
    input (He et al. 2022, arXiv:2110.04366, who take s = 4). Branches are found by dataflow, from the adds that
    join them to the stream. Where a model has neither attention nor feed-forward, every residual branch gets one:
    a ResNet's, by 1×1 convolutions over the channels, or a Mamba mixer's.

    down (m × d) starts normal with deviation 0.01, up (d × m) and the biases at zero, so insertion is exact. A
    layer that the model applies several times has one adapter for all of them. It does not merge: σ stands
    between its two maps. Target: by the branch's last weight (`attn.out`, `mlp.down`, a path).
    """

    name: ClassVar[str] = "adapter"

    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby", description="after attention and feed-forward; after feed-forward; or beside it"
    )
    size: int = Field(64, gt=0, description="width m of the bottleneck")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="σ")
    scale: float = Field(1.0, gt=0, description="s, what the adapter adds is multiplied by it")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the bottleneck's values, in train mode")

    @property
    def effect(self) -> Effect:
        return replace(super().effect, scalable=True)

    def candidates(self, view: View) -> list[Site]:
        found: dict[Any, Site] = {}
        transformer = any(b.kind in _KINDS["houlsby"] for b in view.branches)
        for branch in view.branches:
            if branch.kind in _KINDS[self.placement] or not transformer:
                site = view.site_of(branch.last)
                found.setdefault(site.key, site)
        if not found:
            raise PassError(
                f"adapter: the model has no residual branch for placement {self.placement!r}; "
                + ("try --placement houlsby" if view.branches else "use lora, which needs none")
            )
        return list(found.values())

    def check(self, site: Site) -> str | None:
        if not site.float_dtype.is_floating_point:
            return f"its weight is {site.dtype}; an adapter needs a floating-point stream"
        branches = _branches_of(site, site.probe.view)
        axes = {_channel_axis(site, b.end) for b in branches}
        if len(axes) > 1 or None in axes:
            return "the axis of the features cannot be told at the end of its branch; target other branches"
        if self.placement == "parallel" and any(
            _positions(b.inner, *axes) != _positions(b.end, *axes) for b in branches
        ):
            return "its branch changes the size of the image, so nothing stands beside it; use --placement pfeiffer"
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        branch = _branches_of(site, site.probe.view)[0]
        axis = _channel_axis(site, branch.end)
        assert axis is not None
        read = branch.inner if self.placement == "parallel" else branch.end
        return {
            "axis": axis,
            "rank": _rank(branch.end),
            "in": _size(read, axis),
            "out": _size(branch.end, axis),
        }

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        known = site.decided
        ones = (1,) * (known["rank"] - 2) if known["axis"] == 1 else ()
        return {
            "down": TensorSpec((self.size, known["in"], *ones), _small),
            "down_bias": TensorSpec((self.size,)),
            "up": TensorSpec((known["out"], self.size, *ones)),
            "up_bias": TensorSpec((known["out"],)),
        }

    def rewrite(self, site: Site, g: Rewriter) -> None:
        for branch in _branches_of(site, g.view):
            g.wrap(branch.end, partial(self._beside, site, g, output_with_adapters(branch.inner)))

    def _beside(self, site: Site, g: Rewriter, inner: fx.Node, value: fx.Node) -> fx.Node:
        read = inner if self.placement == "parallel" else value
        hidden = g.call(ACTIVATIONS[self.activation], _map(site, g, read, "down"))
        if self.dropout and g.training:
            hidden = g.call(aten.dropout.default, hidden, self.dropout, True)
        return g.call(aten.add.Tensor, value, _map(site, g, hidden, "up"), alpha=self.scale * g.weight)


def _map(site: Site, g: Rewriter, value: fx.Node, name: str) -> fx.Node:
    """A linear map over the features: of the last axis, or of the channels of an image or a signal."""
    weight, bias = g[name], g[f"{name}_bias"]
    if site.decided["axis"] == -1:
        return g.call(aten.linear.default, value, weight, bias)
    op = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[site.decided["rank"] - 3]
    return g.call(op, value, weight, bias)


def _branches_of(site: Site, view: View) -> list[Branch]:
    nodes = {call.node.name for call in site.calls}
    return [branch for branch in view.branches if branch.last.name in nodes]


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _size(node: fx.Node, axis: int) -> int:
    return int(node.meta["val"].shape[axis])


def _positions(node: fx.Node, axis: int | None) -> list[str]:
    """The sizes of all axes but that of the features."""
    sizes = [str(size) for size in node.meta["val"].shape]
    del sizes[axis or 0]
    return sizes


def _channel_axis(site: Site, end: fx.Node) -> int | None:
    """-1 or 1: where the features are in the branch's result; None where both could be, or neither."""
    shape = end.meta["val"].shape
    wide = site.size("d" if "d" in site.layout else "o")
    fits = [axis for axis in (-1, 1) if isinstance(shape[axis], int) and shape[axis] == wide]
    if len(fits) < 2 or len(shape) == 2:
        return fits[0] if fits else None
    like = [str(call.node.meta["val"].shape) for call in site.calls]  # symbols have no hash
    usual = 1 if site.kind == "conv" else -1
    return usual if str(shape) in like else None
