"""convert: replaces weights that were trained with `fake-quant` by their codes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, fx

from surgery.engine.contract.numerics import EXACT, Numerics
from surgery.graph.marks import mark_of
from surgery.graph.rewrite.current import weight_reader
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes.quantize import dequantize, fake_quantize
from surgery.passes.quantize.codes_pass import CodesPass
from surgery.passes.quantize.matrix import Layout


class Convert(CodesPass):
    """Conversion after quantization-aware training: replaces weights that `fake-quant` rounds by their codes.

    The codes are those of the current weights, in the format, groups and zero points of `fake-quant`, so the outputs
    stay the same to the bit. The result is as if `quantize` had been applied to the trained weights: the codes are
    stored packed, adapters attach to them, and they stay codes in ONNX. With `int8-dynamic`, the input of each op is
    still rounded by `fake-quant`. There is no merged form. Undo restores the trained weights, which are again rounded
    in every forward pass.
    """

    name: ClassVar[str] = "convert"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass fake-quant --target all-linear --format "
        "int8 -o rounding/\n"
        "surgery apply rounding/ --pass convert -o int8/"
    )
    numerics: ClassVar[Numerics] = EXACT
    default_target: ClassVar[str | None] = "all"
    requires: ClassVar[tuple[str, ...]] = ("fake-quant",)

    def find(self, view: View) -> list[Site]:
        """Return the targeted sites whose weight is rounded or coded now; others are ignored."""
        return [site for site in super().find(view) if self._is_rounded(site)]

    def _is_rounded(self, site: Site) -> bool:
        """True if the op reads a rounded or decoded weight."""
        if site.weight is None or site.kind not in self.on:
            return False
        return weight_reader(site.calls[0])[1].target in (
            fake_quantize._opoverload,
            dequantize._opoverload,
        )

    def layout(self, site: Site) -> Layout:
        decided = site.decided
        paired = decided.get("paired", False)
        return Layout.of(site, decided["format"], decided["block"], decided["asymmetric"], paired)

    def source(self, site: Site) -> Tensor:
        return site.probe.weight(site)

    def check(self, site: Site) -> str | None:
        current = weight_reader(site.calls[0])[1]
        if current.target is dequantize._opoverload:
            return f"{mark_of(current).entry!r} has quantized it already; undo that first"
        if not site.probe.in_memory:
            return "its weight is not in memory, and its codes are computed from it; load the weights first"
        # In the middle of a schedule the op reads a mixture of the weight and its rounding, which no codes give.
        share = current.args[6] if len(current.args) > 6 else None
        if isinstance(share, fx.Node) and (there := float(site.probe.tensor(str(share.target)))) < 1:
            return (
                f"{mark_of(current).entry!r} has moved it {there:.0%} of the way to its codes; train to the "
                f"end of its schedule first"
            )
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        _, format, block, asymmetric, *others = weight_reader(site.calls[0])[1].args
        own = {"format": format, "block": block, "asymmetric": asymmetric}
        # The arguments after `asymmetric` are order, rows, share and paired.
        if len(others) > 3 and others[3]:
            own["paired"] = True
        return super().decide(site.deciding(own)) | own
