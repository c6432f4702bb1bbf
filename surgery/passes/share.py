"""share: lets layers use a common weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass, default_names
from surgery.engine.contract.effect import SWAP, Effect
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, NORM
from surgery.graph.rewrite.current import tensors_now, weight_given_by
from surgery.graph.rewrite.refusals import not_floating
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site, SiteKey
from surgery.graph.view import View


@dataclass(frozen=True)
class Group:
    """Sites that share a weight.

    Attributes:
        sites: Sites of one role and shape at the same place in their blocks, in the order of the layers.
    """

    sites: tuple[Site, ...]

    @property
    def leader(self) -> Site:
        """The site of the first layer."""
        return self.sites[0]


class Share(RewritePass):
    """Weight sharing: the layers of a group compute with one weight, whose gradient is the sum of theirs.

    Layers are the repeated blocks of the model. Targeted weights share if they have the same role, the same shape and
    the same place in their blocks. Groups are all layers of a row, N runs of consecutive layers (`groups`: ALBERT, Lan
    et al. 2020, arXiv:1909.11942), or every k-th layer (`every`: the cycle of Takase & Kiyono 2021, arXiv:2104.06022).
    The shared weight is that of the first layer, or the mean as a new tensor. Biases are treated in the same way.

    The outputs change, unless the weights are equal already; both modes are then exact. The weights of the other layers
    are neither read nor counted nor exported, and a saved program stores a shared weight once. Undo restores each.
    `untie` gives layers their own copies of the trained weight. Each layer may get its own adapters. Neither they nor
    this pass can be merged, because a merge for one layer would change all.
    """

    name: ClassVar[str] = "share"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass share --target mlp.up -o shared/"
    )
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS, NORM)
    numerics: ClassVar[Numerics] = changes("ties weights of layers")

    mode: Literal["first", "mean"] = Field(
        default="first", description="the shared weight: the first layer's, or the mean"
    )
    groups: int | None = Field(
        default=None,
        gt=0,
        description="split the layers into this many groups of consecutive ones (default: one group)",
    )
    every: int | None = Field(
        default=None, gt=0, description="instead of --groups: every k-th layer shares, in k groups"
    )
    biases: Literal["shared", "own"] = Field(default="shared", description="whether biases are shared too")

    @property
    def effect(self) -> Effect:
        return replace(SWAP, one_layer=False)  # layers read the weights of others

    @model_validator(mode="after")
    def _one_grouping(self) -> Share:
        if self.groups is not None and self.every is not None:
            raise PassError("pass 'share': give one of --groups and --every, not both")
        return self

    # -- groups

    def _groups(self, site: Site) -> dict[SiteKey, Group]:
        view = site.probe.view
        return site.probe.once((self, "groups"), lambda: self._find_groups(view))

    def _find_groups(self, view: View) -> dict[SiteKey, Group]:
        """Every targeted site in a repeated block -> its group."""
        wanted = {site.key for site in self.find(view)}
        found: dict[SiteKey, Group] = {}
        for row in view.blocks:
            alike: dict[Hashable, dict[SiteKey, Site]] = defaultdict(dict)
            for block in row:
                place: dict[str, int] = defaultdict(int)
                for call in block.calls:
                    site = view.site_of(call.node)
                    number = place[site.role]
                    place[site.role] += 1
                    # A module that several blocks call is one site; it counts in the first block.
                    if site.key in wanted and not any(site.key in sites for sites in alike.values()):
                        same = (
                            site.role,
                            number,
                            site.kind,
                            site.shape,
                            site.layout,
                            site.dtype,
                            bool(site.bias),
                        )
                        alike[self._number(block.index, len(row)), same][site.key] = site
            for sites in alike.values():
                found.update(dict.fromkeys(sites, Group(tuple(sites.values()))))
        return found

    def _number(self, layer: int, layers: int) -> int:
        """Number of the group of a layer."""
        if self.every is not None:
            return layer % self.every
        return layer * min(self.groups or 1, layers) // layers

    # -- the pass

    def check(self, site: Site) -> str | None:
        packed = not_floating(site, "share before quantizing")
        if packed:
            return packed
        own = tensors_now(site)
        if isinstance(own, str):
            return own
        group = self._groups(site).get(site.key)
        if group is None:
            return "it is in none of the model's repeated blocks, so no other layer has such a weight"
        if len(group.sites) < 2:
            return "no other layer of its group has a targeted weight of this role and shape at this place"
        for other in group.sites:
            standing = tensors_now(other)
            if isinstance(standing, str):
                return f"{other.path} shares with it, and {standing}"
        if len({self._now(other) for other in group.sites}) == 1:
            return f"{self._sharing(group)} its group reads one weight already"
        return None

    @staticmethod
    def _sharing(group: Group) -> str:
        entries = [entry for site in group.sites if (entry := weight_given_by(site))]
        return f"since {entries[0]!r}" if entries else "in the model itself"

    def _now(self, site: Site) -> tuple[str, str | None]:
        """Names of the tensors that the site reads now as weight and, if biases are shared, as bias."""
        standing = tensors_now(site)
        assert not isinstance(standing, str)
        return standing[0], standing[1] if self.biases == "shared" else None

    def decide(self, site: Site) -> dict[str, Any]:
        group = self._groups(site)[site.key]
        leader = group.leader
        weight, bias = self._now(leader)
        if self.mode == "mean":
            names = default_names(self, leader, ("weight", "bias"))
            weight, bias = names["weight"], names["bias"] if bias is not None else None
        decided: dict[str, Any] = {"weight": weight, "bias": bias, "layers": len(group.sites)}
        if site.key == leader.key:
            decided["leads"] = [list(site.probe.tensor(n).shape) for n in self._now(leader) if n is not None]
        return decided

    def outcome(self, site: Site) -> Outcome:
        kept = {site.decided["weight"], site.decided["bias"]}
        unused = {name for name in self._now(site) if name is not None} - kept
        return Outcome(unused=frozenset(unused))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if self.mode == "first" or "leads" not in site.decided:
            return {}
        return {
            slot: TensorSpec(tuple(shape), self._mean(site, index))
            for index, (slot, shape) in enumerate(
                zip(("weight", "bias"), site.decided["leads"], strict=False)
            )
        }

    def _mean(self, site: Site, index: int) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            names = [str(self._now(other)[index]) for other in self._groups(site)[site.key].sites]
            values = [site.probe.tensor(name) for name in names]
            # The mean of equal values may round; sharing equal weights must be exact.
            alike = all(torch.equal(value, values[0]) for value in values)
            tensor.copy_(values[0] if alike else torch.stack([v.double() for v in values]).mean(0))

        return fill

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        leads = "leads" in site.decided
        if leads and self.mode == "first":
            return None
        own = leads and self.mode == "mean"
        g.swap_weight(lambda weight: g["weight"] if own else g.get(site.decided["weight"]))
        if site.decided["bias"] is not None:
            g.swap_bias(lambda bias: g["bias"] if own else g.get(site.decided["bias"]))
        return None
