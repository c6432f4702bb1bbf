"""Base class of passes that replace a weight by quantized codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import SWAP, Effect
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import low_rank
from surgery.passes.quantize.codes import Codes
from surgery.passes.quantize.matrix import Layout
from surgery.passes.quantize.ops import dequantize
from surgery.passes.quantize.requantize import into_codes


class CodesPass(RewritePass):
    """A pass that lets an op read `surgery::dequantize` of stored codes instead of its weight.

    A subclass defines `layout`, and the other methods where the defaults do not fit.
    """

    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    absorber = staticmethod(into_codes)

    @property
    def rounding(self) -> tuple[Any, ...]:
        """Ops added by this pass that round their first argument, an activation, to a few levels."""
        return ()

    @property
    def effect(self) -> Effect:
        return replace(SWAP, rounding=self.rounding)

    def layout(self, site: Site) -> Layout:
        """Number format and matrix form of the site's codes."""
        raise NotImplementedError

    def source(self, site: Site) -> Tensor:
        """Return the weight to encode, in its stored layout."""
        return site.probe.stored(site)

    def encode(self, site: Site, weight: Tensor) -> Codes:
        """Encode a weight of the site's shape."""
        return self.layout(site).encode(weight)

    def recode(self, site: Site, weight: Tensor, held: Codes) -> Codes:
        """Encode a changed weight of a site that is quantized already.

        Args:
            site: The site.
            weight: The changed weight, with adapters merged into it.
            held: The current codes; settings that do not depend on the weight (smoothing factors) are kept.
        """
        return self.encode(site, weight)

    def keeps_out(self, site: Site) -> str:
        """Return the reason why adapters at the site cannot be merged into its codes, or ""."""
        return ""

    def _encoded(self, site: Site) -> Codes:
        """Encode the site's weight, once for planning and for all of its tensors."""
        return site.probe.once((self, site.key), lambda: self.encode(site, self.source(site)))

    def decide(self, site: Site) -> dict[str, Any]:
        layout = self.layout(site)
        decided: dict[str, Any] = {"order": list(layout.order)}
        if site.probe.in_memory:
            weight = self.source(site).float()
            found = self._encoded(site)
            decided["error"] = _error(weight, layout.decode(found))
            if layout.paired:
                whole = replace(layout, paired=False).encode(weight, smooth=found.smooth)
                decided["error_of_8_bits"] = _error(weight, layout.decode(whole))
        return decided

    def outcome(self, site: Site) -> Outcome:
        # If other ops read the weight too, it stays in use and nothing is saved.
        users = [c for c in site.calls if c.weight is not None and len(c.weight.users) > len(site.calls)]
        unused = frozenset[str]() if users or site.weight is None else frozenset({site.weight})
        if "error" not in site.decided:
            return Outcome(unused=unused)
        size = sum(spec.numel() * _bytes(spec, site) for spec in self.tensors(site).values())
        before = site.parameters * site.dtype.itemsize
        note = f"{size / before:.3f} of its bytes; the weight changes by {site.decided['error']:.2%}"
        if "error_of_8_bits" in site.decided:
            note += f" ({site.decided['error_of_8_bits']:.2%} with --cpu vnni)"
        return Outcome(note=note, unused=unused)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return self.layout(site).specs(lambda name: self._filled(site, name))

    def _filled(self, site: Site, name: str) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            tensor.copy_(getattr(self._encoded(site), name))
            # The cached codes are as large as the tensors, so they are dropped after the last one is filled.
            if name == self.layout(site).names[-1]:
                site.probe.forget((self, site.key))

        return fill

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        layout = self.layout(site)

        def read(_: fx.Node) -> fx.Node:
            # The stored weight is not an argument: after this nothing needs it at run time.
            zero = g["zero"] if layout.asymmetric else None
            smooth = (g["smooth"],) if layout.smoothed else ()
            return g.call(dequantize._opoverload, g["codes"], g["scale"], zero, *layout.arguments, *smooth)

        g.swap_weight(read)
        # A merge of adapters into the codes may have added a low-rank correction of the rounding error.
        if site.decided.get("correction"):
            return low_rank.add_branch(site, g, g["right"], g["left"], 1.0)
        return None


def _error(weight: Tensor, given: Tensor) -> float:
    """Relative change of a weight, in the Frobenius norm."""
    moved = torch.linalg.vector_norm(weight - given)
    return round(float(moved / torch.linalg.vector_norm(weight).clamp(min=1e-30)), 6)


def _bytes(spec: TensorSpec, site: Site) -> int:
    return (spec.dtype or site.float_dtype).itemsize
