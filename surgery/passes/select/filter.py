"""Filter: the strongest output filters train, the rest of their weights is held."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from surgery.common.errors import PassError
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection
from surgery.graph.ops import CONV, EXPERTS, LINEAR
from surgery.graph.sites import Site

_KINDS = (LINEAR, CONV, EXPERTS)


class Filter(SelectPass):
    """Train part of each weight: gradients are multiplied by a mask M, so that ΔW = M ⊙ ΔW.

    By filter, M is one for the output features (rows of a linear weight, filters of a convolution, rows of each
    expert) whose L1 norm Σ|w| is among the largest `--fraction` or `--count` of their weight, the measure by which
    Li et al. 2017 (arXiv:1608.08710) tell filters that matter; the bias of a chosen filter trains, the others' do
    not. By weight, M is one for the single values of largest |w|, and biases are held.

    `--source nonzero` takes the mask that L1 or group-lasso training left behind: exactly what is not zero in the
    program as it is (|w|, or a filter's Σ|w|, above `--threshold`) trains, and what is zero stays pruned.

    Targets conv, linear and expert weights, by default all but the head's; a new head trains whole, the rest of
    the base not at all. Masks are kept with the program. They hold with SGD, Adam, AdamW and other optimisers that
    move a value by its own gradients, as long as weight decay spares what is masked, as the groups of
    `program.parameter_groups()` do. Outputs do not change.
    """

    name: ClassVar[str] = "filter"
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    by: Literal["filter", "weight"] = Field(
        "filter", description="whether whole output filters or single weights are chosen"
    )
    source: Literal["norm", "nonzero"] = Field(
        "norm", description="norm: those of largest L1 norm; nonzero: those that are not zero now"
    )
    fraction: float | None = Field(
        None, gt=0, le=1, description="share of each weight's filters (or values) that trains; 0.1 by default"
    )
    count: int | None = Field(
        None, gt=0, description="number of each weight's filters (or values) that train"
    )
    threshold: float = Field(0.0, ge=0, description="up to this, a norm (or value) counts as zero")

    @model_validator(mode="after")
    def _consistent(self) -> Filter:
        if self.fraction is not None and self.count is not None:
            raise ValueError("--fraction and --count each say how many train; give one of them")
        if self.source == "nonzero" and (self.fraction is not None or self.count is not None):
            raise ValueError("--source nonzero takes what is not zero; leave out --fraction and --count")
        if self.source == "norm" and self.threshold:
            raise ValueError("--threshold says what counts as zero with --source nonzero; add that")
        return self

    def selection(self, candidates: Candidates) -> Selection:
        masks: dict[str, Tensor] = {}
        for name, site in self._sites(candidates):
            weight = candidates.probe.tensor(name)
            weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
            rows = self._rows(site, weight) if self.by == "filter" else None
            chosen = self._chosen(weight.abs() if rows is None else rows)
            mask = chosen if rows is None else _along_outputs(site, chosen, weight)
            masks[name] = masks[name] | mask if name in masks else mask
            if rows is not None and site.bias is not None and site.kind != EXPERTS:
                bias = candidates.first(site.bias)
                masks[bias] = masks[bias] | chosen if bias in masks else chosen
        if self.source == "nonzero" and all(bool(mask.all()) for mask in masks.values()):
            what = "filter" if self.by == "filter" else "value"
            raise PassError(
                f"filter: no {what} of the {len(masks)} parameters that it targets is zero (up to --threshold "
                f"{self.threshold:g}); train them with an L1 or group-lasso penalty first, raise --threshold, or "
                f"use --source norm"
            )
        trains = {name for name, mask in masks.items() if mask.any()}
        if not trains:
            raise PassError("filter: everything that it targets is zero, so that nothing would train")
        partly = {n: m for n, m in masks.items() if n in trains and not m.all()}
        return Selection(candidates.only(trains | set(candidates.fresh)), masks=partly)

    def _sites(self, candidates: Candidates) -> list[tuple[str, Site]]:
        found = []
        for name in candidates.targeted:
            for site in candidates.sites.get(name, ()):
                spared = self.target is None and site.role.startswith("head")
                if site.kind in _KINDS and not spared and candidates.can_train(name):
                    found.append((name, site))
        if not found:
            raise PassError(
                "filter: the target names no conv, linear or expert weight (the head's need a target of their own, "
                "--target head)"
            )
        return found

    def _rows(self, site: Site, weight: Tensor) -> Tensor:
        """L1 norm of every output filter: (out,), or (experts, out)."""
        size = weight.abs()
        if site.kind == EXPERTS:
            return size.sum(site.layout.index("i"))
        if site.kind == CONV and site.layout == "io":  # transposed: groups lie along the inputs
            groups = site.groups
            per_group = size.reshape(groups, size.shape[0] // groups, size.shape[1], -1)
            return per_group.sum((1, 3)).flatten()
        return size.movedim(site.layout.index("o"), 0).flatten(1).sum(1)

    def _chosen(self, size: Tensor) -> Tensor:
        """Which of these train, of the same shape: the largest of each row of the last axis, or those above zero."""
        if self.source == "nonzero":
            return size > self.threshold
        flat = size if self.by == "filter" else size.flatten()
        total = flat.shape[-1]
        share = 0.1 if self.fraction is None else self.fraction
        wanted = min(total, self.count if self.count is not None else max(1, math.ceil(share * total - 1e-9)))
        # Stable, so that equal norms give the same choice everywhere.
        order = flat.argsort(dim=-1, descending=True, stable=True)[..., :wanted]
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order, True).view(size.shape)


def _along_outputs(site: Site, chosen: Tensor, weight: Tensor) -> Tensor:
    """A choice of output filters as a mask of the weight, with size 1 along what it is the same for."""
    if site.kind == EXPERTS:
        return chosen.unsqueeze(site.layout.index("i"))
    if site.kind == CONV and site.layout == "io" and site.groups > 1:
        wide = chosen.view(site.groups, 1, -1).expand(-1, weight.shape[0] // site.groups, -1)
        return wide.reshape(*weight.shape[:2], *(1 for _ in weight.shape[2:]))
    shape = [1] * weight.dim()
    shape[site.layout.index("o")] = -1
    return chosen.view(shape)
