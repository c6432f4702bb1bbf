"""sparse-tune: a trained sparse update of a weight, on a support that is fixed when it is applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import ADAPTER, Effect
from surgery.engine.contract.folds import Fold, Stage
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR
from surgery.graph.rewrite.current import replaced_op, weight_given_by, weight_reader
from surgery.graph.rewrite.refusals import computed_weight
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import low_rank, packed
from surgery.passes.measure.fisher import fisher

aten = torch.ops.aten


class SparseTune(RewritePass):
    """Sparse fine-tuning: W becomes W + S, where S is zero but for k trained values at fixed places.

    `indices` (k, int64, sorted) are places in the flattened weight, `values` (k) start at zero, so insertion is
    exact. The support of each weight is chosen once: its values of largest magnitude; those of largest diagonal
    Fisher information on the data (`gradient`: the FISH mask, Sung et al. 2021, arXiv:2111.09839); or at random
    (SHiRA, Bhardwaj et al. 2024, arXiv:2406.13175). On a fused qkv, parts choose among their own rows.

    Merge: W[indices] += values, which is the very sum that the graph makes, so in single precision merged and
    unmerged are the same bits. A tied weight is changed in this use alone. Applications add up.

    Where an op keeps its weight packed (a plugin's `WeightOp` with `dequantize`) the codes stay, and S x is added to
    what the op gives; the support is chosen among the values that it unpacks to, or by the gradient that these would
    have (of linear maps, where the op passes gradients on). Not of stacked experts, and nothing is folded.
    """

    name: ClassVar[str] = "sparse-tune"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)

    by: Literal["magnitude", "gradient", "random"] = Field(
        "magnitude",
        description="how the support is chosen: magnitude, gradient (Fisher, on the data), random",
    )
    density: float | None = Field(
        None, gt=0, le=1, description="fraction of each weight's values that train (default 0.01)"
    )
    count: int | None = Field(
        None, gt=0, description="in place of a density: how many values of each weight train"
    )

    @model_validator(mode="after")
    def _one_size(self) -> SparseTune:
        if self.density is not None and self.count is not None:
            raise PassError("pass 'sparse-tune': give one of --density and --count, not both")
        return self

    @property
    def effect(self) -> Effect:
        return replace(ADAPTER, scalable=True, partial=True)

    def check(self, site: Site) -> str | None:
        computed = computed_weight(site)
        if computed:
            return computed
        if not site.float_dtype.is_floating_point:
            return f"its weight is {site.dtype}, and no op dequantizes it; there is no value to add to"
        if site.packed and (unread := self._check_packed(site)):
            return unread
        replaced = replaced_op(site, "undo that first, or leave the site out")
        if replaced:
            return replaced
        if self.count is not None and self.count > (there := self._room(site)):
            return f"it has {there:,} values, and --count asks for {self.count:,}"
        if self.by != "gradient":
            return None
        name, inserted = self._source(site), site.probe.tensors
        if name in inserted and not isinstance(inserted[name], nn.Parameter):
            given = weight_given_by(site)
            return f"{given!r} has put a weight there that does not train; choose --by magnitude or random"
        if not self._importance(site).any():
            return "no gradient of the data reaches it; choose --by magnitude or random, or give data that uses it"
        return None

    def _check_packed(self, site: Site) -> str | None:
        unread = packed.refusal(site)
        if unread:
            return f"{unread}; leave it out with !, or use lora"
        if site.kind == CONV and (lacking := low_rank.lacks(site)):
            return f"its op {site.op} has no argument {lacking}, so what S would compute is not known"
        if self.by == "gradient" and site.kind != LINEAR:
            return f"of a packed {site.kind} weight no gradient is measured; choose --by magnitude or random"
        return None

    def _rows(self, site: Site) -> list[int]:
        """Output features to choose among: all where it is empty."""
        return sorted(row for part in site.selected_parts for row in site.parts[part])

    def _room(self, site: Site) -> int:
        rows = self._rows(site)
        there = math.prod(site.float_shape)
        return there // site.out_features * len(rows) if rows else there

    def decide(self, site: Site) -> dict[str, Any]:
        density = 0.01 if self.density is None else self.density
        count = self.count or max(1, round(density * self._room(site)))
        return {"count": count, **({"parts": list(site.selected_parts)} if site.selected_parts else {})}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        shape = (site.decided["count"],)
        support = TensorSpec(shape, self._choose(site), trainable=False, dtype=torch.int64)
        return {"indices": support, "values": TensorSpec(shape)}

    def _choose(self, site: Site) -> Callable[[Tensor], Any]:
        def fill(indices: Tensor) -> None:
            rows = self._rows(site)
            places = None
            if rows:
                number = torch.arange(math.prod(site.float_shape)).reshape(site.float_shape)
                places = number.index_select(site.layout.index("o"), torch.tensor(rows)).flatten()
            if self.by == "random":
                chosen = torch.randperm(self._room(site))[: len(indices)]
            else:
                importance = self._importance(site).flatten()
                offered = importance[places] if places is not None else importance
                chosen = offered.topk(len(indices), sorted=False).indices
            indices.copy_((places[chosen] if places is not None else chosen).sort().values)

        return fill

    def _importance(self, site: Site) -> Tensor:
        assert site.weight is not None
        name = self._source(site)
        if self.by == "gradient":
            return fisher(site.probe, name)
        return (site.probe.dequantized(site) if site.packed else site.probe.tensor(name)).abs().float()

    @staticmethod
    def _source(site: Site) -> str:
        """The tensor that the site's op reads now, below what sparse updates were made before."""
        _, value = weight_reader(site.calls[0])
        while value.op != "get_attr":
            value = value.all_input_nodes[0]
        return str(value.target)

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        def add(weight: fx.Node) -> fx.Node:
            flat = g.call(aten.reshape.default, weight, [-1])
            return self._scattered(site, g, flat)

        def update() -> fx.Node:
            size = math.prod(site.float_shape)
            return self._scattered(site, g, g.call(aten.new_zeros.default, g["values"], [size]))

        if not site.packed:
            g.swap_weight(add)
            return None
        made = g.once(f"S of {g['values'].target}", update) if len(site.calls) > 1 else update()
        return g.call(aten.add.Tensor, g.output, low_rank.product(site, g, g.x, made, site.layout))

    def _scattered(self, site: Site, g: Rewriter, flat: fx.Node) -> fx.Node:
        values = g["values"] if g.weight == 1 else g.call(aten.mul.Tensor, g["values"], g.weight)
        summed = g.call(aten.scatter_add.default, flat, 0, g["indices"], values)
        return g.call(aten.reshape.default, summed, list(site.float_shape))

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        return {"weight": AddSparse(tensors["indices"], tensors["values"], weight)}


@dataclass(frozen=True)
class AddSparse(Fold):
    """Merge: add scale · values to a weight at places of its flattened self, below other adapters as in the graph."""

    stage: ClassVar[Stage] = Stage.WEIGHT

    indices: Tensor
    values: Tensor
    scale: float = 1.0

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        values = self.values.detach() if self.scale == 1 else self.values.detach() * self.scale
        return weight.put_(self.indices, values.to(weight.dtype), accumulate=True)
