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

# Kinds of residual branches that get an adapter, by placement.
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

    h is the result of a residual branch just before it is added to the residual stream, after any dropout, layer scale
    and norm of the branch. `houlsby` adapts every branch, that is after attention and after feed-forward (Houlsby et
    al. 2019, arXiv:1902.00751). `pfeiffer` adapts only feed-forward branches (Pfeiffer et al. 2021, arXiv:2005.00247).
    `parallel` reads the input of the feed-forward branch and adds to its result (He et al. 2022, arXiv:2110.04366, with
    s = 4). Branches are found by dataflow, from the adds that join them to the stream. In a model without attention and
    feed-forward every residual branch gets an adapter: in a ResNet 1×1 convolutions over the channels, in Mamba linear
    maps at each mixer.

    down (m × d) starts normal with standard deviation 0.01; up (d × m) and the biases start at zero, so insertion is
    exact. A layer that the model applies several times has a single adapter. The pass cannot be merged, because σ is
    nonlinear. The target names the last weight of a branch (`attn.out`, `mlp.down`, a path).
    """

    name: ClassVar[str] = "adapter"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass adapter "
        "--size 64 -o adapted/"
    )

    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        default="houlsby",
        description="after attention and feed-forward; after feed-forward; or parallel to it",
    )
    size: int = Field(default=64, gt=0, description="width m of the bottleneck")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(
        default="relu", description="activation function σ"
    )
    scale: float = Field(default=1.0, gt=0, description="factor s of the adapter's output")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability of dropping a value of the bottleneck, in train mode",
    )

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
            return "the feature axis at the end of its branch is ambiguous; target other branches"
        if self.placement == "parallel" and any(
            _positions(b.inner, *axes) != _positions(b.end, *axes) for b in branches
        ):
            return "its branch changes the image size, so nothing can be parallel to it; use --placement pfeiffer"
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        branch = _branches_of(site, site.probe.view)[0]
        axis = _channel_axis(site, branch.end)
        assert axis is not None  # see `check`
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
    """Insert a linear map over the features: the last axis, or the channels of an image or a signal."""
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
    """The sizes of all axes except the features."""
    sizes = [str(size) for size in node.meta["val"].shape]
    del sizes[axis or 0]
    return sizes


def _channel_axis(site: Site, end: fx.Node) -> int | None:
    """Axis of the features in the result of a branch, -1 or 1; None if neither or both are possible."""
    shape = end.meta["val"].shape
    wide = site.size("d" if "d" in site.layout else "o")
    fits = [axis for axis in (-1, 1) if isinstance(shape[axis], int) and shape[axis] == wide]
    if len(fits) < 2 or len(shape) == 2:
        return fits[0] if fits else None
    # Both axes have the right size. The result of the branch then has its features where the last weight puts them,
    # if it still has that op's shape. Shapes are compared as text because symbolic sizes have no hash.
    like = [str(call.node.meta["val"].shape) for call in site.calls]
    usual = 1 if site.kind == "conv" else -1
    return usual if str(shape) in like else None
