"""int8-static: products of int8 weights and 8-bit activations, whose scales are set beforehand on data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from surgery.api import (
    CONV,
    LINEAR,
    Call,
    CodesPass,
    Field,
    Numerics,
    PassError,
    Quantize,
    Rewriter,
    Site,
    changes,
)
from torch_surgery_torchao.op import quantize_dequantize

if TYPE_CHECKING:
    from torch_surgery_torchao.calibrate import Edge, Ranges

aten = torch.ops.aten

RELUS = (aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default)
# What onnxruntime computes on codes as they are, or moves them through.
PASSING = (*RELUS, aten.max_pool2d.default, aten.dropout.default, aten.flatten.using_ints, aten.view.default,
           aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)  # fmt: skip


class Int8Static(CodesPass):
    """Static int8: y = W x + b becomes s_w·s_x·(W₈ x₈) + b (Jacob et al. 2018, arXiv:1712.05877).

    Weights: int8, symmetric, one scale for each output, as `quantize --format int8` makes them (`--method gptq` too).
    Activations: uint8 with one scale and one zero point for each tensor, which torchao's PT2E observers set on
    `--data` (prepare_pt2e with a Quantizer that annotates the targeted sites and nothing else): `histogram` takes the
    range of least squared error, `minmax` all that was seen, `moving-average` a running mean of each set's extremes.
    What enters a linear map or a convolution is rounded; what leaves a convolution too, after its relu where it has
    one, unless only quantized sites read it. `--output op` rounds right behind the convolution, so that adapters can
    stand between that and the relu.

    Scales, zero points and codes are written down and never computed again. Gradients pass straight through rounding;
    adapters read x as it was before rounding, and their gradients do not reach the codes (QLoRA). `merge --quantized`
    folds an adapter into them where a budget allows it, what it makes of x before rounding included; not where the
    convolution's output is rounded right behind it, to a range that was seen without the adapter. In ONNX a rounding
    is QuantizeLinear and DequantizeLinear, which onnxruntime fuses with the op into MatMulIntegerToFloat and
    QLinearConv; the export fails where it does not. Undo gives W back bit for bit. The outputs change by design.
    """

    name: ClassVar[str] = "int8-static"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV)
    numerics: ClassVar[Numerics] = changes("weights and activations are rounded to 8 bits")

    observer: Literal["histogram", "minmax", "moving-average"] = Field(
        "histogram", description="how the range of an activation follows from what was seen of it"
    )
    method: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="of the weights: round to nearest, or make up for errors on the data (linear maps)",
    )
    output: Literal["auto", "op"] = Field(
        "auto", description="where what leaves a convolution is rounded: after its relu, or right behind it"
    )

    @property
    def in_place(self) -> bool:
        return self.output == "op"

    @property
    def rounding(self) -> tuple[Any, ...]:
        return (quantize_dequantize._opoverload,)

    @property
    def detaches(self) -> str:
        return "gradients pass straight through the rounding of activations"

    @property
    def _weights(self) -> Quantize:
        return Quantize(target=self.target, label=self.label, format="int8", method=self.method)

    def check(self, site: Site) -> str | None:
        unfit = self._unfit(site)
        if unfit:
            return unfit
        ranges = self._ranges(site)
        flat = any(ranges.read[edge].largest == 0 for edge in _edges(site))
        if flat:
            return "what enters it is zero on all of the calibration data; give data that reaches it"
        return None

    def _unfit(self, site: Site) -> str | None:
        """Why a site is refused, whatever the data are."""
        if site.weight is not None and site.dtype is not torch.float32:
            return (
                f"its weight is {site.dtype}, and onnxruntime's int8 products give float32; load the model in float32 "
                "(--dtype float32)"
            )
        if site.kind == CONV and site.layout == "io":
            return "it is a transposed convolution, of which onnxruntime has none in int8; use quantize there"
        if any(call.x_axis == "column" for call in site.calls):
            return (
                "it computes W @ x, and onnxruntime has one scale there for all rows of W; use quantize there"
            )
        if not site.probe.in_memory:
            return "its weight is not in memory, and calibration has to run the model; load the weights first"
        return self._weights.check(site)

    def _ranges(self, site: Site) -> Ranges:
        """Of all sites that are fit, found in one run over the data."""
        probe = site.probe

        def make() -> Ranges:
            # Importing torchao takes seconds, and a journal is replayed without it.
            from torch_surgery_torchao.calibrate import calibrate

            fit = [s for s in self._targeted(site) if s.kind in self.on and not self._unfit(s)]
            edges = [edge for s in fit for edge in _edges(s)]
            places = [self._place(call, set(edges)) for s in fit if s.kind == CONV for call in s.calls]
            return calibrate(probe, edges, [p.name for p in places if p is not None], self.observer)

        return probe.once((self, "ranges"), make)

    def _targeted(self, site: Site) -> list[Site]:
        found = self.find(site.probe.view)
        return [replace(s, measured=site.probe) for s in found]

    def _place(self, call: Call, edges: set[Edge]) -> fx.Node | None:
        """After which node what leaves a convolution is rounded; None where sites that read it do that."""
        if self.output == "op":
            return call.node
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
        place = self._place(call, set(ranges.read))
        if place is None:
            return None
        range_ = ranges.given[place.name]
        after = "op" if place is call.node else "relu"
        return {"scale": range_.scale, "zero": range_.zero, "after": after}

    def note(self, site: Site) -> str:
        parts = [self._weights.note(site)] if "error" in site.decided else []
        first = site.decided["input"][0]
        low, high = (first["scale"] * (end - first["zero"]) for end in (0, 255))
        parts.append(f"reads {low:.3g} to {high:.3g}")
        return "; ".join(parts)

    def layout(self, site: Site) -> Any:
        return self._weights.layout(site)

    def encode(self, site: Site, weight: Tensor) -> Any:
        return self._weights.encode(site, weight)

    def keeps_out(self, site: Site) -> str:
        if any(given and given["after"] == "op" for given in site.decided.get("output", ())):
            return (
                "what it gives is rounded right behind it, to a range that was seen without the adapter; undo "
                f"{self.entry_id!r}, merge to --format hf, and quantize that"
            )
        return ""

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        call = g.call_
        assert call is not None
        index = site.calls.index(call)
        read = site.decided["input"][index]

        def rounded(by: dict[str, Any]):
            return lambda value: g.call(quantize_dequantize._opoverload, value, by["scale"], by["zero"])

        g.replace_input(rounded(read))
        corrected = super().rewrite(site, g)
        given = site.decided.get("output", {}) and site.decided["output"][index]
        if given:
            if given["after"] == "op":
                g.stand_in(call.node, rounded(given))
            else:
                relu = _relu(call)
                if relu is None:
                    raise PassError(f"{self.entry_id} at {site.path}: its relu is not where it was")
                g.wrap(relu, rounded(given))
        return corrected


def _edges(site: Site) -> list[Edge]:
    return [(call.node.name, call.x.name) for call in site.calls]


def _written(ranges: Ranges, edge: Edge) -> dict[str, Any]:
    return {"scale": ranges.read[edge].scale, "zero": ranges.read[edge].zero}


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _relu(call: Call) -> fx.Node | None:
    """The relu that alone reads what a convolution gives."""
    user = _only_user(call.node)
    return user if user is not None and user.target in RELUS else None
