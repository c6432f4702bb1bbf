"""sparse-tune: trains a sparse update of a weight, at places that are fixed when the pass is applied."""

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
    """Sparse fine-tuning: W becomes W + S, where S has k trained values at fixed places and is zero elsewhere.

    `indices` (k, int64, sorted) are places in the flattened weight. `values` (k) start at zero, so the outputs do not
    change at insertion. `--by` sets how the places of each weight are chosen, once:

    - `magnitude`: the values of largest magnitude.
    - `gradient`: the values of largest diagonal Fisher information on the data (the FISH mask, Sung et al. 2021,
      arXiv:2111.09839).
    - `random`: at random (SHiRA, Bhardwaj et al. 2024, arXiv:2406.13175).

    For parts of a fused projection, places are chosen among their rows only. If a weight is tied, only the targeted use
    of it changes. Several applications add up.

    Merge: W[indices] += values. The graph computes the same sum, so in single precision merged and unmerged weights are
    bit-identical.

    If an op stores its weight packed (a `WeightOp` of a plugin with `dequantize`), the codes are kept, and S x is added
    to the output of the op. Places are chosen among the decoded values, or by the gradients that these would have
    (linear layers only, if the op passes gradients on). Packed stacked experts are refused, and packed weights have no
    merged form.
    """

    name: ClassVar[str] = "sparse-tune"
    example: ClassVar[str] = (
        'surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass sparse-tune --target "attn.*" --density '
        "0.01 -o adapted/"
    )
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)

    by: Literal["magnitude", "gradient", "random"] = Field(
        default="magnitude",
        description="choice of the places: magnitude, gradient (Fisher information on the data), or random",
    )
    density: float | None = Field(
        default=None, gt=0, le=1, description="fraction of each weight's values that train (default 0.01)"
    )
    count: int | None = Field(
        default=None, gt=0, description="instead of a density: number of values of each weight that train"
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
            return f"its weight is {site.dtype}, and no op dequantizes it, so nothing can be added to it; leave it out"
        if site.packed and (unread := self._check_packed(site)):
            return unread
        replaced = replaced_op(site, "undo that first, or leave the site out")
        if replaced:
            return replaced
        if self.count is not None and self.count > (there := self._room(site)):
            return f"it has {there:,} values, and --count asks for {self.count:,}; lower --count"
        if self.by != "gradient":
            return None
        name, inserted = self._source(site), site.probe.tensors
        if name in inserted and not isinstance(inserted[name], nn.Parameter):
            given = weight_given_by(site)
            return f"{given!r} has replaced its weight by one that does not train; choose --by magnitude or random"
        if not self._importance(site).any():
            return "no gradient reaches it on the data; choose --by magnitude or random, or give data that uses it"
        return None

    def _check_packed(self, site: Site) -> str | None:
        """Return the reason why a packed weight is refused, or None."""
        unread = packed.refusal(site)
        if unread:
            return f"{unread}; leave it out with !, or use lora"
        if site.kind == CONV and (lacking := low_rank.lacks(site)):
            return f"its op {site.op} has no argument {lacking}, which the update needs; leave it out with !"
        if self.by == "gradient" and site.kind != LINEAR:
            return f"gradients of a packed {site.kind} weight cannot be measured; choose --by magnitude or random"
        return None

    def _rows(self, site: Site) -> list[int]:
        """Return the output features of the selected parts; empty: all."""
        return sorted(row for part in site.selected_parts for row in site.parts[part])

    def _room(self, site: Site) -> int:
        """Return the number of values to choose from."""
        rows = self._rows(site)
        there = math.prod(site.float_shape)
        return there // site.out_features * len(rows) if rows else there

    def decide(self, site: Site) -> dict[str, Any]:
        density = 0.01 if self.density is None else self.density
        count = self.count or max(1, round(density * self._room(site)))
        return {"count": count, **({"parts": list(site.selected_parts)} if site.selected_parts else {})}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        shape = (site.decided["count"],)
        support = TensorSpec(
            shape, self._choose(site), trainable=False, dtype=torch.int64, below=math.prod(site.float_shape)
        )
        return {"indices": support, "values": TensorSpec(shape)}

    def _choose(self, site: Site) -> Callable[[Tensor], Any]:
        """Return a function that fills `indices`."""

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
                # Only the set matters, so topk need not sort; the indices are sorted below.
                chosen = offered.topk(len(indices), sorted=False).indices
            indices.copy_((places[chosen] if places is not None else chosen).sort().values)

        return fill

    def _importance(self, site: Site) -> Tensor:
        """Return the importance of every value of the weight."""
        assert site.weight is not None
        name = self._source(site)
        if self.by == "gradient":
            return fisher(site.probe, name)
        return (site.probe.dequantized(site) if site.packed else site.probe.tensor(name)).abs().float()

    @staticmethod
    def _source(site: Site) -> str:
        """Return the name of the tensor that the site's op reads now, without earlier sparse updates."""
        # Earlier sparse updates are chains of ops on a stored tensor; walk down to it.
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
        # Several calls of a packed op share one dense S.
        made = g.once(f"S of {g['values'].target}", update) if len(site.calls) > 1 else update()
        return g.call(aten.add.Tensor, g.output, low_rank.product(site, g, g.x, made, site.layout))

    def _scattered(self, site: Site, g: Rewriter, flat: fx.Node) -> fx.Node:
        """Add the values to a flattened weight, and reshape the sum."""
        values = g["values"] if g.weight == 1 else g.call(aten.mul.Tensor, g["values"], g.weight)
        summed = g.call(aten.scatter_add.default, flat, 0, g["indices"], values)
        return g.call(aten.reshape.default, summed, list(site.float_shape))

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        return {"weight": AddSparse(tensors["indices"], tensors["values"], weight)}


@dataclass(frozen=True)
class AddSparse(Fold):
    """Merge: add scale · values to the flattened weight, before other adapters are merged.

    Attributes:
        indices: Places in the flattened weight (k).
        values: Values to add (k).
        scale: Weight of the application.
    """

    stage: ClassVar[Stage] = Stage.WEIGHT

    indices: Tensor
    values: Tensor
    scale: float = 1.0

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        values = self.values.detach() if self.scale == 1 else self.values.detach() * self.scale
        return weight.put_(self.indices, values.to(weight.dtype), accumulate=True)
