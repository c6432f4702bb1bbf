"""prune-filters: filters, neurons and heads of least importance are removed, and with them what they feed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from surgery.common.errors import PassError
from surgery.engine.contract.base import GraphPass
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes.prune import plan as planning
from surgery.passes.prune.mend import mend
from surgery.passes.prune.places import Place, are_spent, places
from surgery.passes.prune.sweep import coupling_of


class PruneFilters(GraphPass):
    """Structured pruning: the least important units of every group are removed, and the model is smaller for it.

    A unit is what has to go together: a filter with its batch norm and the weights that read its channel; a neuron of
    an MLP with its gate, its row of the up projection and its column of the down projection; a head with its rows of
    q, k and v and its columns of the output projection (with grouped queries, a head of keys and values with its group
    of query heads). Units are found by sending the indices of every weight through the graph: residual adds,
    concatenation, splits, views, grouped and depthwise convolutions, norms and products say which of them are one
    (DepGraph: Fang et al. 2023, arXiv:2301.12900). What an op is not known to do keeps all that enters it, and is
    refused by its name.

    From each group of U units the ⌊ratio · U⌋ least important go, W' = W[kept][:, kept]; sizes in views, splits and
    convolutions of the graph are mended. `--importance l1` (Li et al. 2017, arXiv:1608.08710) sums |w| over the weights
    that make a unit and take it in, each tensor over its mean; `l2` sums w²; `taylor` sums (∂L/∂w · w)² over its
    parameters, the change of the loss to first order (Molchanov et al. 2019, arXiv:1906.10771, eq. 7), L being the log
    likelihood of answers drawn from the model on --data (or the example), so that no labels are needed.

    Pruned by default are the units within blocks, and the channels of residual streams that batch norm follows. A
    stream that a layer norm takes together (of a transformer, a ConvNeXt) is pruned where the target names what makes
    it first, such as `embed.token`, the patch embedding, or `all`. What is left computes what the program did with the
    removed units at zero, wherever no norm or mean takes them together. The smaller weights stand in the place of the
    old, which are not run, counted or exported any more; they train as those did, and are targets of later passes:
    layers.3.mlp.up.prune-filters. There is no merged form.
    """

    name: ClassVar[str] = "prune-filters"
    numerics: ClassVar[Numerics] = changes("units are removed")
    structural: ClassVar[bool] = True
    freezes: ClassVar[bool] = False

    ratio: float = Field(1 / 3, gt=0, lt=1, description="part of the units of each group that goes")
    importance: Literal["l1", "l2", "taylor"] = Field(
        "l1", description="of a unit: sum of |w|, of w², or the change of the loss to first order"
    )
    scope: Literal["local", "global"] = Field(
        "local", description="rank units within their group, or (over its mean) with those of all groups"
    )
    round_to: int = Field(
        1, gt=0, description="keep a multiple of this many channels in each group (8 suits tensor cores)"
    )

    @property
    def leads(self) -> bool:
        return True

    # -- where

    def candidates(self, view: View) -> list[Site]:
        return [place.site for place in places(view, None)]

    def find(self, view: View) -> list[Site]:
        found = [place.site for place in places(view, self.target)]
        if not found:
            left = " (one unit is left in each group)" if are_spent(view) else ""
            raise PassError(
                "pass 'prune-filters': the model has no filters, neurons or heads within its blocks that could be "
                f"removed{left}; name what makes the units with --target to see why"
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

    def note(self, site: Site) -> str:
        units = []
        for group in site.decided["groups"]:
            each = f" of {group['rows']}" if group["rows"] > 1 and group["what"] != "heads" else ""
            units.append(f"{group['units']} {group['what']}{each} → {group['units'] - group['removed']}")
        saved = site.decided["saved"]
        return (
            f"{'; '.join(units)}; {saved['parameters']:,} parameters, {saved['macs']:,} multiply-adds fewer"
        )

    def frees(self, site: Site) -> set[str]:
        return {known["name"] for known in site.decided["tensors"] if known["trains"]}

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

    def tensor_names(self, site: Site) -> dict[str, str]:
        """mlp.up.prune-filters.weight is what is left of mlp.up.weight."""
        found = {}
        for known in site.decided["tensors"]:
            owner, _, leaf = known["name"].rpartition(".")
            found[known["name"]] = f"{owner}.{self.attribute}.{leaf}".lstrip(".")
        return found

    # -- graph

    def rewrite(self, site: Site, g: Rewriter) -> None:
        run = coupling_of(g.view)
        for known in site.decided["tensors"]:
            for node in run.readers.get(known["name"], ()):
                g.exchange(node, known["name"])

    def finish(self, sites: Sequence[Site], g: Rewriter) -> None:
        run = coupling_of(g.view)
        keep = planning.kept_atoms(run, sites)
        gone = run.unit_of[~keep].unique()
        if not torch.equal(torch.isin(run.unit_of, gone), ~keep):
            raise PassError(
                f"{self.entry_id}: units depend on each other in another way in this graph; undo it, and apply it to "
                f"the model as it is"
            )
        mend(g, run, keep)

    def keeps(self, site: Site) -> str | None:
        return "what is left has another shape than the base's weights; export to ONNX, or save the program"


def _filled(site: Site, known: dict[str, Any]) -> Callable[[Tensor], Any]:
    def fill(tensor: Tensor) -> None:
        tensor.copy_(planning.left_of(site.probe.tensor(known["name"]), known, site.decided["removed"]))

    return fill
