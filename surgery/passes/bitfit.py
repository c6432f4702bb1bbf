"""BitFit: trains only biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.folds import Fold
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.marks import output_with_adapters
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, NORM
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View

aten = torch.ops.aten

# Norms that subtract the mean over positions, and so any constant per channel.
_TAKE_OUT = ("batch_norm", "instance_norm")


class Bitfit(RewritePass):
    """BitFit: in y = W x + b only b trains (Ben Zaken et al. 2022, arXiv:2106.10199).

    The biases of linear weights, convolutions and norms train, and no other parameter of the base. An exception is a
    head that the checkpoint does not contain: it trains whole, and with `--train-head` every head does. The base's own
    biases train in place. Disabling the pass (`without`) or undoing it restores their values.

    `--add-missing` adds a bias of zeros to linear, convolution and expert weights without one, b (out), or (experts ×
    out) for stacked experts. Insertion is exact. A convolution before a batch norm gets none: the norm subtracts any
    constant, and its own bias trains. Models without biases (Llama, T5) need this option. A bias on keys has no effect
    in an attention without rotary positions, because softmax cancels it.

    Merge: the base's biases already have their trained values. An added bias stays in the program, since the base has
    no bias for it. The pass cannot be scaled, only switched on and off.
    """

    name: ClassVar[str] = "bitfit"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass bitfit -o biases/"
    )
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EXPERTS, NORM, EMBEDDING)
    default_target: ClassVar[str | None] = "all"

    add_missing: bool = Field(default=False, description="add a bias of zeros to weights without one")
    train_head: bool = Field(default=False, description="train the weights of the head too")

    def find(self, view: View) -> list[Site]:
        asked = super().find(view)
        sites = [s for s in asked if s.key in view.biases or not (_never_has_one(s) or _is_taken_out(s))]
        if not sites:
            raise PassError(
                f"bitfit: nothing that --target {self.target} names has a bias, or a use for one (embeddings have "
                f"none, and a batch norm cancels that of a convolution before it); target linear weights or norms"
            )
        return sites

    def check(self, site: Site) -> str | None:
        if self._biases(site) or (self.train_head and site.role.startswith("head")):
            return None
        if site.bias_is_computed:
            return "its bias is computed, not a parameter; target the weights that it is computed from"
        if not self.add_missing:
            return "it has no bias; --add-missing gives it one at zero"
        if not site.float_dtype.is_floating_point:
            return f"its weight is {site.dtype}, and no op dequantizes it; target floating-point weights"
        return None

    def _biases(self, site: Site) -> list[str]:
        return site.probe.view.biases.get(site.key, [])

    def decide(self, site: Site) -> dict[str, Any]:
        biases = self._biases(site)
        missing = self.add_missing and not biases and not site.bias_is_computed
        return {"biases": biases, "missing": missing}

    def outcome(self, site: Site) -> Outcome:
        names = list(site.decided["biases"])
        if self.train_head and site.role.startswith("head") and site.weight is not None:
            names.append(site.weight)
        return Outcome(trains=dict.fromkeys(names, True))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if not site.decided["missing"]:
            return {}
        experts = (site.size("e"),) if site.kind == EXPERTS else ()
        return {"bias": TensorSpec((*experts, _outputs(site)))}

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        if not site.decided["missing"]:
            return None
        bias = g["bias"]
        if site.kind == CONV:
            bias = g.call(aten.view.default, bias, [-1, *(1 for _ in site.float_shape[2:])])
        elif site.kind == EXPERTS:
            if g.site_call.gather is not None:
                bias = g.call(aten.index_select.default, bias, 0, g.site_call.gather)
            bias = g.call(aten.unsqueeze.default, bias, -1 if g.site_call.x_axis == "column" else 1)
        return g.call(aten.add.Tensor, g.output, bias)

    def why_not_merged(self, site: Site) -> str | None:
        return "the base has no bias that could hold the added one" if site.decided["missing"] else None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        return {}


def _outputs(site: Site) -> int:
    transposed = site.kind == CONV and site.layout == "io"
    return site.out_features * (site.groups if transposed else 1)


def _never_has_one(site: Site) -> bool:
    return site.kind in (EMBEDDING, NORM)


def _is_taken_out(site: Site) -> bool:
    """True if every reader of a convolution's output subtracts its mean over positions."""
    readers = [user for call in site.calls for user in output_with_adapters(call.node).users]
    return bool(readers) and all(op_name(user.target) in _TAKE_OUT for user in readers)
