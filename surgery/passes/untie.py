"""untie: gives a site its own copy of a tied or shared weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, fx

from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import STRUCTURE, WEIGHT, Effect
from surgery.engine.contract.folds import Fold
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, NORM
from surgery.graph.rewrite.current import (
    adapted_by,
    bias_now,
    read_elsewhere,
    tensors_now,
    weight_given_by,
    weight_reader,
)
from surgery.graph.rewrite.refusals import not_floating
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra.instead import Become


class Untie(RewritePass):
    """Untie: the site reads W' (and b'), trained copies of the weight (and bias) that it shared with others.

    It acts on weights that the model itself ties, such as the output layer and the embedding, and on weights that
    `share` has tied. A copy starts at the current, perhaps trained, value, so insertion is exact. Other sites still
    share theirs. Merge: the weight of the site becomes the copy. Undo ties it again, with the value of the other sites.

    With `--calls`, a layer that runs several times is untied from itself: every call but the first gets copies of its
    own, as layers that later passes can target (conv.untie.call2). There is no merged form of this, since the model
    has one weight for all calls.
    """

    name: ClassVar[str] = "untie"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass untie --target head -o untied/"
    )
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS, NORM)

    calls: bool = Field(
        default=False, description="give every call of a layer that runs several times its own copy"
    )

    @property
    def effect(self) -> Effect:
        return STRUCTURE if self.calls else WEIGHT

    def check(self, site: Site) -> str | None:
        standing = tensors_now(site)
        if isinstance(standing, str):
            return standing
        packed = not_floating(site, "it cannot train apart")
        if packed:
            return packed
        if self.calls:
            return self._one_call(site)
        if not self._shared(site):
            given = weight_given_by(site)
            since = f" since {given!r}" if given else ""
            if len(site.calls) > 1:
                return (
                    f"only its own {len(site.calls)} calls read its weight{since}; untie them from each other with "
                    "--calls (calls=True in Python)"
                )
            return f"nothing else reads its weight{since}; there is nothing to untie"
        return None

    def _one_call(self, site: Site) -> str | None:
        """Reason why the calls of a site cannot be untied from each other, or None."""
        if len(site.calls) < 2:
            earlier = (e for e in site.probe.journal if e.pass_name == self.name)
            done = [
                e.id for e in earlier if e.options.get("calls") and any(r.key == site.key for r in e.sites)
            ]
            return f"it is called once{f' since {done[0]!r}' if done else ''}; leave out --calls"
        adapter = next((entry for entry in map(adapted_by, site.calls) if entry), None)
        if adapter:
            return f"it carries {adapter!r}, which all its calls share; untie them first, or undo {adapter!r}"
        if len({weight_reader(call)[0] for call in site.calls}) < len(site.calls):
            return "its calls read one transposed or reshaped value of its weight; they cannot be told apart"
        return None

    def _shared(self, site: Site) -> dict[str, str]:
        """Those of "weight" and "bias" that something else reads too, with the name of the tensor."""
        names = site.probe.names
        return {
            slot: name
            for slot, name in zip(("weight", "bias"), self._read(site), strict=True)
            if name is not None and read_elsewhere(site, name, names.get(name, ()))
        }

    def decide(self, site: Site) -> dict[str, Any]:
        if self.calls:
            weight, bias = self._read(site)
            held = {"weight": weight, **({"bias": bias} if bias is not None else {})}
            shapes = {
                f"call{number + 1}.{slot}": list(site.probe.tensor(name).shape)
                for number in range(1, len(site.calls))
                for slot, name in held.items()
            }
            return {"shapes": shapes}
        sizes = {slot: list(site.probe.tensor(name).shape) for slot, name in self._shared(site).items()}
        return {"shapes": sizes}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {
            slot: TensorSpec(tuple(shape), self._copy(site, slot))
            for slot, shape in site.decided["shapes"].items()
        }

    def _copy(self, site: Site, slot: str) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            names = dict(zip(("weight", "bias"), self._read(site), strict=True))
            tensor.copy_(site.probe.tensor(str(names[slot.rpartition(".")[2]])))

        return fill

    @staticmethod
    def _read(site: Site) -> tuple[str, str | None]:
        """Names of the tensors that the site reads as weight and bias."""
        standing = tensors_now(site)
        assert not isinstance(standing, str)
        return standing

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        slots = site.decided["shapes"]
        if self.calls:
            self._untie_call(site, g)
            return None
        if "weight" in slots:
            g.swap_weight(lambda weight: g["weight"])
        if "bias" in slots:
            g.swap_bias(lambda bias: g["bias"])
        return None

    @staticmethod
    def _untie_call(site: Site, g: Rewriter) -> None:
        """Let a call read its own copies; the first call keeps the weight."""
        call = g.site_call
        number = [each.node for each in site.calls].index(call.node) + 1
        if number == 1:
            return
        reader, weight = weight_reader(call)
        g.swap_tensor(weight, f"call{number}.weight", reader)
        bias = bias_now(call)
        if bias is not None and f"call{number}.bias" in site.decided["shapes"]:
            g.swap_tensor(bias, f"call{number}.bias", call.node)

    def why_not_merged(self, site: Site) -> str | None:
        return "the model has one weight for all calls of the layer" if self.calls else None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        return {slot: Become(tensor) for slot, tensor in tensors.items()}
