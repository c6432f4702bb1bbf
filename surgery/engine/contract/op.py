"""Base class of passes that compute a site with another op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import SWAP, Effect
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.rewrite.current import no_weight_to_replace
from surgery.graph.rewrite.refusals import scaled_op
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site


class OpPass(RewritePass):
    """A pass that computes a site with another op, under the adapters of the site.

    A subclass defines `pack`, the tensors that the op reads instead of the weight, and `op`, which inserts the op.
    Adapters that were applied earlier stay around the new op, and later ones attach to it. The weight is neither run
    nor exported, and `undo` restores it. Nothing can be merged into it: an adapter stays a branch beside the op.

    Attributes:
        lowerings: ONNX forms of the ops, as the hook `surgery_onnx_lowerings` returns them: op -> onnxscript function.
    """

    lowerings: ClassVar[Mapping[Any, Any]] = {}

    @property
    def effect(self) -> Effect:
        return SWAP

    @property
    def numerics(self) -> Numerics:
        """Largest change of the outputs; packing changes them by default."""
        return changes("the op computes with packed weights")

    def pack(self, site: Site, weight: Tensor) -> Mapping[str, Tensor]:
        """The tensors that the op reads instead of the weight, by their names in the pass.

        Shapes and dtypes may depend only on the weight's shape, on options and on `site.decided`.

        Args:
            site: The site, with `site.decided`.
            weight: The weight that the op reads now, in its stored layout.
        """
        raise NotImplementedError

    def op(self, site: Site, g: Rewriter) -> fx.Node:
        """Insert the op and return its output, with the features last.

        Args:
            site: The site, with `site.decided`.
            g: The rewriter at a call of the site: `g.op_input` is what the op reads, with the features last, `g.bias`
                its bias or None, `g["codes"]` a tensor that `pack` returned.
        """
        raise NotImplementedError

    def check(self, site: Site) -> str | None:
        refused = no_weight_to_replace(site, "leave it out", "leave the site out, or undo that first")
        return refused or scaled_op(site, "leave it out")

    def outcome(self, site: Site) -> Outcome:
        users = [c for c in site.calls if c.weight is not None and len(c.weight.users) > len(site.calls)]
        return Outcome() if users or site.weight is None else Outcome(unused=frozenset({site.weight}))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            made = self.pack(site, torch.empty(site.shape, dtype=site.dtype))
        names = list(made)
        return {
            name: TensorSpec(
                tuple(value.shape),
                self._filled(site, name, names[-1]),
                trainable=False,
                dtype=self._dtype(site, value),
            )
            for name, value in made.items()
        }

    @staticmethod
    def _dtype(site: Site, value: Tensor) -> torch.dtype | None:
        """Dtype of a packed tensor; None for the site's own, so that it is not part of what the journal fixes."""
        return None if value.dtype == site.float_dtype else value.dtype

    def _filled(self, site: Site, name: str, last: str) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            packed = site.probe.once((self, site.key), lambda: self._packed(site))
            tensor.copy_(packed[name])
            # The cached tensors are as large as the new ones, so they are dropped after the last is filled.
            if name == last:
                site.probe.forget((self, site.key))

        return fill

    def _packed(self, site: Site) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return self.pack(site, site.probe.stored(site).detach())

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        g.swap_op(lambda: self.op(site, g))
        return None
