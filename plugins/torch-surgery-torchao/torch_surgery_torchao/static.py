"""int8-static: products of int8 weights and 8-bit activations, with scales calibrated on data in advance."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from surgery.api import (
    CONV,
    LINEAR,
    Call,
    Effect,
    Expectations,
    Field,
    Numerics,
    Outcome,
    PassError,
    Rewriter,
    Site,
    changes,
)
from surgery.api.quantization import CodesPass, Layout, Quantize
from torch_surgery_torchao.op import quantize_dequantize

if TYPE_CHECKING:
    from torch_surgery_torchao.calibrate import Edge, Ranges

aten = torch.ops.aten

RELUS = (aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default)
# Ops that onnxruntime computes directly on codes.
PASSING = (*RELUS, aten.max_pool2d.default, aten.dropout.default, aten.flatten.using_ints, aten.view.default,
           aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)  # fmt: skip


class Int8Static(CodesPass):
    """Static int8: y = W x + b becomes s_w·s_x·(W₈ x₈) + b (Jacob et al. 2018, arXiv:1712.05877).

    Weights are int8, symmetric, with one scale s_w for each output, rounded to nearest or with `--method gptq`.
    Activations are uint8, with one scale s_x and one zero point for each tensor. torchao's PT2E observers find
    these on `--data`, by prepare_pt2e with a quantizer that annotates only the targeted sites: `histogram` takes
    the range with the smallest squared error, `minmax` the range of all values seen, and `moving-average` a running
    mean of the extremes of each data set.

    The input of each linear layer and convolution is rounded. The output of a convolution is rounded too, after its
    relu if it has one, unless only quantized sites read it. With `--output op` it is rounded directly after the
    convolution, so that adapters can be inserted between that and the relu.

    Scales, zero points and codes are computed once and stored. Gradients pass through rounding unchanged. Adapters read
    x before it is rounded, and no gradients reach the codes (QLoRA). `merge --quantized` merges an adapter into the
    codes if a budget allows it; the error includes the adapter's effect on the part of x that rounding removes. It
    keeps adapters of a convolution whose output is rounded directly after it, because that range was calibrated without
    the adapter. There is no other merged form. The outputs change by design. Undo restores W bit for bit.

    By default (`--cpu any`), weights are encoded so that no product overflows on processors without VNNI, as in
    `quantize --format int8-dynamic`; depthwise convolutions keep all 8 bits. `--cpu vnni` keeps all 8 bits everywhere.

    In ONNX, each rounding is QuantizeLinear and DequantizeLinear, which onnxruntime fuses with the op into
    MatMulIntegerToFloat and QLinearConv. The export fails if a product would be computed in floating point.
    """

    name: ClassVar[str] = "int8-static"
    example: ClassVar[str] = "surgery apply timm:resnet18 --pass int8-static --target all -o int8/"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV)
    numerics: ClassVar[Numerics] = changes("weights and activations are rounded to 8 bits")

    observer: Literal["histogram", "minmax", "moving-average"] = Field(
        default="histogram", description="how the range of an activation is computed from the values seen"
    )
    method: Literal["nearest", "gptq"] = Field(
        default="nearest",
        description="weights: round to nearest, or compensate rounding errors on the data (linear layers)",
    )
    cpu: Literal["any", "vnni"] = Field(
        default="any",
        description="any keeps products in range on every processor; vnni uses all 8 bits and needs VNNI",
    )
    output: Literal["auto", "op"] = Field(
        default="auto",
        description="where the output of a convolution is rounded: auto, after its relu; op, directly after it",
    )

    @property
    def rounding(self) -> tuple[Any, ...]:
        return (quantize_dequantize._opoverload,)

    @property
    def effect(self) -> Effect:
        return replace(super().effect, one_layer=self.output == "op")

    @property
    def expectations(self) -> Expectations:
        return Expectations(detached="gradients pass through the rounding of activations unchanged")

    @property
    def _weights(self) -> Quantize:
        """The pass that encodes the weights."""
        return Quantize(target=self.target, label=self.label, format="int8", method=self.method)

    def check(self, site: Site) -> str | None:
        unfit = self._unfit(site)
        if unfit:
            return unfit
        ranges = self._ranges(site)
        flat = any(ranges.read[edge].largest == 0 for edge in _edges(site))
        if flat:
            return "its input is zero on all of the calibration data; give data that reaches it"
        return None

    def _unfit(self, site: Site) -> str | None:
        """Return the reason why a site is refused, whatever the data are, or None."""
        if site.weight is not None and site.dtype is not torch.float32:
            return (
                f"its weight is {site.dtype}, and onnxruntime's int8 products give float32; load the model in float32 "
                "(--dtype float32)"
            )
        if site.kind == CONV and site.layout == "io":
            return (
                "it is a transposed convolution, which onnxruntime cannot compute in int8; use quantize there"
            )
        if any(call.x_axis == "column" for call in site.calls):
            return (
                "it computes W @ x, where onnxruntime allows one scale for all rows of W; use quantize there"
            )
        if not site.probe.in_memory:
            return "its weight is not in memory, and calibration runs the model; load the weights first"
        return self._weights.check(site)

    def _ranges(self, site: Site) -> Ranges:
        """Return the ranges of all sites that are not refused, measured in one run over the data."""
        probe = site.probe

        def make() -> Ranges:
            # torchao takes seconds to import, and replaying a journal does not need it.
            from torch_surgery_torchao.calibrate import calibrate

            fit = [s for s in self._targeted(site) if s.kind in self.on and not self._unfit(s)]
            edges = [edge for s in fit for edge in _edges(s)]
            places = [self._place(call, set(edges)) for s in fit if s.kind == CONV for call in s.calls]
            return calibrate(probe, edges, [p.name for p in places if p is not None], self.observer)

        return probe.once((self, "ranges"), make)

    def _targeted(self, site: Site) -> list[Site]:
        """Return all targeted sites, with the measurements of this one."""
        found = self.find(site.probe.view)
        return [replace(s, measured=site.probe) for s in found]

    def _place(self, call: Call, edges: set[Edge]) -> fx.Node | None:
        """Return the node after which the output of a convolution is rounded.

        None: the sites that read the output round it themselves.
        """
        if self.output == "op":
            return call.node
        # Follow ops that work on codes to the value that other ops read.
        last = call.node
        while (user := _only_user(last)) is not None and user.target in PASSING:
            last = user
        if last.users and all((user.name, last.name) in edges for user in last.users):
            return None
        return _relu(call) or call.node

    def decide(self, site: Site) -> dict[str, Any]:
        ranges, decided = self._ranges(site), super().decide(site)
        decided["input"] = [_written(ranges, edge) for edge in _edges(site)]
        if site.kind == CONV:
            decided["output"] = [self._written_output(site, call, ranges) for call in site.calls]
        if not site.probe.given:
            decided["seen"] = "on the example inputs alone; give --data"
        return decided

    def _written_output(self, site: Site, call: Call, ranges: Ranges) -> dict[str, Any] | None:
        """Return what the journal records about the rounding of a convolution's output, or None."""
        place = self._place(call, set(ranges.read))
        if place is None:
            return None
        range_ = ranges.given[place.name]
        after = "op" if place is call.node else "relu"
        return {"scale": range_.scale, "zero": range_.zero, "after": after}

    def outcome(self, site: Site) -> Outcome:
        plain = super().outcome(site)
        parts = [plain.note] if "error" in site.decided else []
        first = site.decided["input"][0]
        low, high = (first["scale"] * (end - first["zero"]) for end in (0, 255))
        parts.append(f"reads {low:.3g} to {high:.3g}")
        return replace(plain, note="; ".join(parts))

    def layout(self, site: Site) -> Any:
        return Layout.of(site, "int8", paired=self.cpu == "any")

    def encode(self, site: Site, weight: Tensor) -> Any:
        return self.layout(site).encode(weight, site.probe.products(site) if self.method == "gptq" else None)

    def keeps_out(self, site: Site) -> str:
        if any(given and given["after"] == "op" for given in site.decided.get("output", ())):
            return (
                "its output is rounded directly after it, to a range that was calibrated without the adapter; undo "
                f"{self.entry_id!r}, merge to --format hf, and quantize that"
            )
        return ""

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        call = g.site_call
        assert call is not None
        index = site.calls.index(call)
        read = site.decided["input"][index]

        def rounded(by: dict[str, Any]):
            return lambda value: g.call(quantize_dequantize._opoverload, value, by["scale"], by["zero"])

        # Adapters keep reading the unrounded input: only the op's own argument is replaced.
        g.replace_input(rounded(read))
        corrected = super().rewrite(site, g)
        given = site.decided.get("output", {}) and site.decided["output"][index]
        if given:
            if given["after"] == "op":
                g.replace_output(call.node, rounded(given))
            else:
                relu = _relu(call)
                if relu is None:
                    raise PassError(
                        f"{self.entry_id} at {site.path}: its relu was not found; undo later passes that changed it"
                    )
                g.wrap(relu, rounded(given))
        return corrected


def _edges(site: Site) -> list[Edge]:
    """Return the input edges of a site's calls."""
    return [(call.node.name, call.x.name) for call in site.calls]


def _written(ranges: Ranges, edge: Edge) -> dict[str, Any]:
    """Return what the journal records about the range of an edge."""
    return {"scale": ranges.read[edge].scale, "zero": ranges.read[edge].zero}


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the only reader of a value, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _relu(call: Call) -> fx.Node | None:
    """Return the relu that is the only reader of a convolution's output, or None."""
    user = _only_user(call.node)
    return user if user is not None and user.target in RELUS else None
