"""untie: gives a site its own copy of a tied or shared weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, fx

from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import WEIGHT, Effect
from surgery.engine.contract.folds import Fold
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, NORM
from surgery.graph.rewrite.current import read_elsewhere, tensors_now, weight_given_by
from surgery.graph.rewrite.refusals import not_floating
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra.instead import Become


class Untie(RewritePass):
    """Untie: the site reads W' (and b'), trained copies of the weight (and bias) that it shared with others.

    It acts on weights that the model itself ties, such as the output layer and the embedding, and on weights that
    `share` has tied. A copy starts at the current, perhaps trained, value, so insertion is exact. Other sites still
    share theirs. Merge: the weight of the site becomes the copy. Undo ties it again, with the value of the other sites.
    """

    name: ClassVar[str] = "untie"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS, NORM)

    @property
    def effect(self) -> Effect:
        return WEIGHT

    def check(self, site: Site) -> str | None:
        standing = tensors_now(site)
        if isinstance(standing, str):
            return standing
        packed = not_floating(site, "it cannot train apart")
        if packed:
            return packed
        if not self._shared(site):
            given = weight_given_by(site)
            since = f" since {given!r}" if given else ""
            return f"nothing else reads its weight{since}; there is nothing to untie"
        return None

    def _shared(self, site: Site) -> dict[str, str]:
        """Those of "weight" and "bias" that something else reads too, with the name of the tensor."""
        standing = tensors_now(site)
        assert not isinstance(standing, str)
        names = site.probe.names
        return {
            slot: name
            for slot, name in zip(("weight", "bias"), standing, strict=True)
            if name is not None and read_elsewhere(site, name, names.get(name, ()))
        }

    def decide(self, site: Site) -> dict[str, Any]:
        sizes = {slot: list(site.probe.tensor(name).shape) for slot, name in self._shared(site).items()}
        return {"shapes": sizes}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {
            slot: TensorSpec(tuple(shape), self._copy(site, slot))
            for slot, shape in site.decided["shapes"].items()
        }

    def _copy(self, site: Site, slot: str) -> Callable[[Tensor], Any]:
        return lambda tensor: tensor.copy_(site.probe.tensor(self._shared(site)[slot]))

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        slots = site.decided["shapes"]
        if "weight" in slots:
            g.swap_weight(lambda weight: g["weight"])
        if "bias" in slots:
            g.swap_bias(lambda bias: g["bias"])
        return None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        return {slot: Become(tensor) for slot, tensor in tensors.items()}
