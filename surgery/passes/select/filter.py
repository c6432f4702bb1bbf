"""filter: trains only the strongest output filters or values of each weight."""

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
    """Partial training: gradients are multiplied by a mask M, so that only some values of each weight change.

    `--by filter` chooses output features: rows of a linear weight, filters of a convolution, rows of each expert. Those
    with the largest L1 norm Σ|w| train (the importance of filters in Li et al. 2017, arXiv:1608.08710); `--fraction` or
    `--count` sets how many of each weight. The bias of a chosen filter trains with it; other biases do not. `--by
    weight` chooses the single values of largest |w|, and no biases.

    `--source nonzero` takes the mask that training with an L1 or group-lasso penalty has left: exactly the values that
    are not zero now train (|w|, or Σ|w| of a filter, above `--threshold`). Values that are zero stay pruned.

    The pass targets conv, linear and expert weights, by default all except the head's. Parameters that the checkpoint
    did not contain, such as a new head, train completely; the rest of the base does not train. Masks are stored in the
    program. They hold for SGD, Adam, AdamW and other optimizers that update each value from its own gradients, if
    weight decay is not applied to masked parameters; the groups of `program.parameter_groups()` ensure that. Applying
    the pass does not change the outputs.
    """

    name: ClassVar[str] = "filter"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass filter "
        "--fraction 0.1 -o some/"
    )
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    by: Literal["filter", "weight"] = Field(
        default="filter", description="choose whole output filters, or single values of weights"
    )
    source: Literal["norm", "nonzero"] = Field(
        default="norm", description="norm: those of largest L1 norm; nonzero: those that are not zero now"
    )
    fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of each weight's filters (or values) that train (default 0.1)",
    )
    count: int | None = Field(
        default=None, gt=0, description="number of each weight's filters (or values) that train"
    )
    threshold: float = Field(
        default=0.0, ge=0, description="nonzero: norms (or magnitudes) up to this count as zero"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Filter:
        if self.fraction is not None and self.count is not None:
            raise ValueError("--fraction and --count both set how many train; give one of them")
        if self.source == "nonzero" and (self.fraction is not None or self.count is not None):
            raise ValueError("--source nonzero trains all that is not zero; leave out --fraction and --count")
        if self.source == "norm" and self.threshold:
            raise ValueError("--threshold is for --source nonzero; add that, or leave --threshold out")
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
                f"filter: no {what} of the {len(masks)} targeted parameters is zero (up to --threshold "
                f"{self.threshold:g}); train them with an L1 or group-lasso penalty first, raise --threshold, or "
                f"use --source norm"
            )
        trains = {name for name, mask in masks.items() if mask.any()}
        if not trains:
            raise PassError(
                "filter: all targeted values are zero, so nothing would train; choose other targets, or --source norm"
            )
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
                "filter: the target names no conv, linear or expert weight; choose other targets (the head's weights "
                "are included only with --target head)"
            )
        return found

    def _rows(self, site: Site, weight: Tensor) -> Tensor:
        """Return the L1 norm of every output filter: (out,), or (experts, out)."""
        size = weight.abs()
        if site.kind == EXPERTS:
            return size.sum(site.layout.index("i"))
        # Transposed convolutions have their groups along the input axis.
        if site.kind == CONV and site.layout == "io":
            groups = site.groups
            per_group = size.reshape(groups, size.shape[0] // groups, size.shape[1], -1)
            return per_group.sum((1, 3)).flatten()
        return size.movedim(site.layout.index("o"), 0).flatten(1).sum(1)

    def _chosen(self, size: Tensor) -> Tensor:
        """Return a mask of the same shape: the largest values along the last axis, or those above the threshold."""
        if self.source == "nonzero":
            return size > self.threshold
        flat = size if self.by == "filter" else size.flatten()
        total = flat.shape[-1]
        share = 0.1 if self.fraction is None else self.fraction
        wanted = min(total, self.count if self.count is not None else max(1, math.ceil(share * total - 1e-9)))
        # A stable sort makes the same choice among equal norms on every machine.
        order = flat.argsort(dim=-1, descending=True, stable=True)[..., :wanted]
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order, True).view(size.shape)


def _along_outputs(site: Site, chosen: Tensor, weight: Tensor) -> Tensor:
    """Expand a choice of output filters to a mask that broadcasts over the weight."""
    if site.kind == EXPERTS:
        return chosen.unsqueeze(site.layout.index("i"))
    if site.kind == CONV and site.layout == "io" and site.groups > 1:
        wide = chosen.view(site.groups, 1, -1).expand(-1, weight.shape[0] // site.groups, -1)
        return wide.reshape(*weight.shape[:2], *(1 for _ in weight.shape[2:]))
    shape = [1] * weight.dim()
    shape[site.layout.index("o")] = -1
    return chosen.view(shape)
