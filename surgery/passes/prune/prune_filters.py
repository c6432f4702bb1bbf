"""prune-filters: removes the least important filters, neurons and heads, and the weights that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from surgery.common.errors import PassError
from surgery.common.quantities import count
from surgery.engine.contract.base import GraphPass, attribute_of
from surgery.engine.contract.effect import STRUCTURE, Effect
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes.prune import plan as planning
from surgery.passes.prune.mend import mend
from surgery.passes.prune.places import Place, are_spent, places
from surgery.passes.prune.sweep import coupling_of


class PruneFilters(GraphPass):
    """Structured pruning: removes the least important units of every group, which makes the model smaller.

    A unit is a set of indices that must be removed together: a filter with its batch norm and the weights that read its
    channel; a neuron of an MLP with its gate, its row of the up projection and its column of the down projection; or a
    head with its rows of q, k and v and its columns of the output projection (with grouped queries, a head of keys and
    values with its group of query heads). Units are found by sending the indices of every weight through the graph.
    Residual adds, concatenation, splits, views, grouped and depthwise convolutions, norms and products couple indices
    (DepGraph: Fang et al. 2023, arXiv:2301.12900). An op without a rule keeps all units that enter it, and the refusal
    names the op.

    From each group of U units the ⌊ratio · U⌋ least important are removed, `W' = W[kept][:, kept]`, and sizes in views,
    splits and convolutions of the graph are updated. `--importance l1` (Li et al. 2017, arXiv:1608.08710) sums |w| over
    the weights that produce and read a unit, each tensor relative to its mean; `l2` sums w²; `taylor` sums
    (∂L/∂w · w)² over the unit's parameters, the first-order change of the loss (Molchanov et al. 2019,
    arXiv:1906.10771, eq. 7). L is the log likelihood of answers drawn from the model on --data (or the example), so no
    labels are needed.

    By default, units within blocks are pruned, and channels of residual streams that batch norm follows. A stream that
    a layer norm combines (in a transformer or a ConvNeXt) is pruned if the target names the op that produces it first,
    such as `embed.token` or the patch embedding, or if the target is `all`. The pruned program computes the same as the
    program with the removed units at zero, except where a norm or mean combines them. The smaller weights replace the
    old ones, which are not run, counted or exported any more. They train like the old ones, and later passes can target
    them: layers.3.mlp.up.prune-filters. There is no merged form.
    """

    name: ClassVar[str] = "prune-filters"
    example: ClassVar[str] = "surgery apply timm:resnet18 --pass prune-filters --ratio 0.3 -o pruned/"
    numerics: ClassVar[Numerics] = changes("units are removed")

    ratio: float = Field(
        default=1 / 3, gt=0, lt=1, description="fraction of the units of each group to remove"
    )
    importance: Literal["l1", "l2", "taylor"] = Field(
        default="l1",
        description="importance of a unit: sum of |w|, sum of w², or first-order change of the loss",
    )
    scope: Literal["local", "global"] = Field(
        default="local",
        description="rank units within their group, or (relative to its mean) across all groups",
    )
    round_to: int = Field(
        default=1,
        gt=0,
        description="keep a multiple of this many channels in each group (8 suits tensor cores)",
    )

    @property
    def effect(self) -> Effect:
        return STRUCTURE

    # -- where

    def candidates(self, view: View) -> list[Site]:
        return [place.site for place in places(view, None)]

    def find(self, view: View) -> list[Site]:
        found = [place.site for place in places(view, self.target)]
        if not found:
            left = " (one unit is left in each group)" if are_spent(view) else ""
            raise PassError(
                "pass 'prune-filters': the model has no filters, neurons or heads within its blocks that can be "
                f"removed{left}; name the op that produces the units with --target to see why"
            )
        return found

    def _places(self, site: Site) -> list[Place]:
        view = site.probe.view
        return site.probe.once((self, "places"), lambda: places(view, self.target))

    def check(self, site: Site) -> str | None:
        place = next(place for place in self._places(site) if place.site.key == site.key)
        return planning.refusal(place, self._request)

    @property
    def _request(self) -> planning.Request:
        return planning.Request(self.ratio, self.importance, self.scope, self.round_to)

    # -- what

    def decide(self, site: Site) -> dict[str, Any]:
        probe = site.probe
        found = probe.once((self, "plan"), lambda: planning.decide(self._places(site), self._request, probe))
        return found[site.key]

    def outcome(self, site: Site) -> Outcome:
        units = []
        for group in site.decided["groups"]:
            each = f" of {group['rows']}" if group["rows"] > 1 and group["what"] != "heads" else ""
            units.append(f"{group['units']} {group['what']}{each} → {group['units'] - group['removed']}")
        saved = site.decided["saved"]
        return Outcome(
            note=f"{'; '.join(units)}; {count(saved['parameters'])} parameters, {count(saved['macs'])} MACs fewer",
            unused=frozenset(known["name"] for known in site.decided["tensors"] if known["trains"]),
        )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {
            known["name"]: TensorSpec(
                tuple(known["shape"]),
                _filled(site, known),
                trainable=known["trains"],
                dtype=getattr(torch, known["dtype"]),
            )
            for known in site.decided["tensors"]
        }

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Name the smaller tensors: mlp.up.prune-filters.weight is the rest of mlp.up.weight."""
        found = {}
        for known in site.decided["tensors"]:
            owner, _, leaf = known["name"].rpartition(".")
            found[known["name"]] = f"{owner}.{attribute_of(self)}.{leaf}".lstrip(".")
        return found

    # -- graph

    def rewrite(self, site: Site, g: Rewriter) -> None:
        run = coupling_of(g.view)
        for known in site.decided["tensors"]:
            for node in run.readers.get(known["name"], ()):
                g.swap_tensor(node, known["name"])

    def finish(self, sites: Sequence[Site], g: Rewriter) -> None:
        run = coupling_of(g.view)
        keep = planning.kept_atoms(run, sites)
        # The units of this graph must be those of the plan: each is removed as a whole or kept as a whole.
        gone = run.unit_of[~keep].unique()
        if not torch.equal(torch.isin(run.unit_of, gone), ~keep):
            raise PassError(
                f"{self.entry_id}: the units of this graph differ from those that were pruned; undo it, and "
                f"apply it again to the model"
            )
        mend(g, run, keep)

    def why_not_merged(self, site: Site) -> str | None:
        return "its weights have another shape than the base's; export to ONNX, or save the program"


def _filled(site: Site, known: dict[str, Any]) -> Callable[[Tensor], Any]:
    def fill(tensor: Tensor) -> None:
        tensor.copy_(planning.left_of(site.probe.tensor(known["name"]), known, site.decided["removed"]))

    return fill
