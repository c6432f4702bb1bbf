"""From weights that were trained rounded to their codes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, fx

from surgery.engine.contract.numerics import EXACT, Numerics
from surgery.graph.rewrite.current import weight_reader
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes.quantize import dequantize, fake_quantize
from surgery.passes.quantize.codes_pass import CodesPass
from surgery.passes.quantize.matrix import Layout


class Convert(CodesPass):
    """Quantization-aware training ended: the codes themselves in the place of weights that `fake-quant` rounds.

    The format, groups and zero points are those of `fake-quant`, and the codes those of the weights as they are now, so
    that the outputs are the same to the bit. From there on it is as if `quantize` had been applied: the codes are
    stored, in the bits that they have, adapters stand on them, and they stay codes in ONNX. Undo gives the weights that
    were trained back, rounded in every forward.
    """

    name: ClassVar[str] = "convert"
    numerics: ClassVar[Numerics] = EXACT
    default_target: ClassVar[str | None] = "all"
    requires: ClassVar[tuple[str, ...]] = ("fake-quant",)

    def find(self, view: View) -> list[Site]:
        """Sites whose weight is rounded or coded now; others that the target names are ignored."""
        return [site for site in super().find(view) if self._is_rounded(site)]

    def _is_rounded(self, site: Site) -> bool:
        if site.weight is None or site.kind not in self.on:
            return False
        return weight_reader(site.calls[0])[1].target in (
            fake_quantize._opoverload,
            dequantize._opoverload,
        )

    def layout(self, site: Site) -> Layout:
        return Layout.of(site, site.decided["format"], site.decided["block"], site.decided["asymmetric"])

    def source(self, site: Site) -> Tensor:
        return site.probe.weight(site)

    def check(self, site: Site) -> str | None:
        current = weight_reader(site.calls[0])[1]
        if current.target is dequantize._opoverload:
            return f"{current.meta['surgery']['entry']!r} has quantized it already; undo that first"
        if not site.probe.in_memory:
            return "its weight is not in memory, and its codes have to be computed; load the weights first"
        share = current.args[6] if len(current.args) > 6 else None
        if isinstance(share, fx.Node) and (there := float(site.probe.tensor(str(share.target)))) < 1:
            return (
                f"{current.meta['surgery']['entry']!r} has moved it {there:.0%} of the way to its codes; train to the "
                f"end of that schedule first"
            )
        return None

    def decide(self, site: Site) -> dict[str, Any]:
        _, format, block, asymmetric, *_ = weight_reader(site.calls[0])[1].args
        return super().decide(site.deciding({"format": format, "block": block, "asymmetric": asymmetric})) | {
            "format": format,
            "block": block,
            "asymmetric": asymmetric,
        }
