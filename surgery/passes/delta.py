"""delta: a site reads another weight (and bias) than the base's, whole and undoable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator
from torch import Tensor, fx

from surgery.common.names import is_plain
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import ADAPTER, Effect
from surgery.engine.contract.folds import Fold
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.engine.schema import check_depth
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, NORM
from surgery.graph.rewrite.current import no_weight_to_replace
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra.instead import Become, read_bias_instead, read_instead

Slot = Literal["weight", "bias"]
# The dtypes that safetensors has, by the names that torch gives them.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def _plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError("has a name with other characters than letters, digits, _ and - between dots")
    return name


def _known(dtype: str) -> str:
    if dtype not in _DTYPES:
        raise ValueError(f"has a tensor of the unknown dtype {dtype[:20]!r}")
    return dtype


Name = Annotated[StrictStr, AfterValidator(_plain)]
Shape = tuple[Annotated[StrictInt, Field(ge=0, le=2**31)], ...]


class Source(BaseModel):
    """The checkpoint that a delta was made from.

    Attributes:
        config: Configuration of the checkpoint.
        tensors: Name of each of its tensors -> dtype and shape.
        slots: Path of a site -> its tensors that the checkpoint changes.
        at: Path of the site that keeps the checkpoint's own tensors.
        digests: Name of a changed tensor of the base -> sha256 of its new value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[StrictStr, Any]
    tensors: dict[Name, tuple[Annotated[StrictStr, AfterValidator(_known)], Shape]]
    slots: dict[StrictStr, tuple[Slot, ...]]
    at: StrictStr
    digests: dict[StrictStr, StrictStr]

    def specs(self) -> dict[str, TensorSpec]:
        """The checkpoint's own tensors, which no op reads, by their names in the pass."""
        return {
            own_name(number): TensorSpec(shape, trainable=False, dtype=_DTYPES[dtype])
            for number, (dtype, shape) in enumerate(self.tensors.values())
        }


def own_name(number: int) -> str:
    """Name in the pass of the checkpoint's own tensor with a number."""
    return f"own_{number}"


def digest(tensor: Tensor) -> str:
    """sha256 of the values of a tensor."""
    held = tensor.detach().cpu().contiguous()
    return hashlib.sha256(held.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


class Delta(RewritePass):
    """Delta: y = W x + b becomes y = V x + b, where V is a trained copy of W, so that V − W is a whole task vector.

    V starts at W, so insertion is exact. The op reads V itself and costs what it did before. `--bias` gives the bias a
    copy too. Other uses of a tied weight still read W. At weight w of the application the op reads W + w·(V − W).

    Merge: the weight becomes V, bit for bit if no other adapter changes it. Undo restores W.

    `surgery import-peft` records as a delta what PEFT can merge and no other pass computes: V is the weight that PEFT
    merged. `--source` is then the configuration of the checkpoint, whose own tensors are kept, unread, so that
    `surgery export-peft` can give it back.
    """

    name: ClassVar[str] = "delta"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass delta --target mlp.down -o adapted/"
    )
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS, NORM)

    bias: bool = Field(default=False, description="a trained copy of the bias too")
    source: str | None = Field(
        default=None,
        repr=False,
        description="checkpoint that the values came from, as JSON; import-peft sets it",
    )

    @field_validator("source")
    @classmethod
    def _read(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                Source.model_validate(check_depth(json.loads(text)))
            except RecursionError:
                raise ValueError("is nested too deeply") from None
        return text

    @cached_property
    def origin(self) -> Source | None:
        """The checkpoint that the values came from, or None."""
        return None if self.source is None else Source.model_validate(json.loads(self.source))

    @property
    def effect(self) -> Effect:
        return replace(ADAPTER, scalable=True)

    def check(self, site: Site) -> str | None:
        refused = no_weight_to_replace(site, "quantize it after this", "apply this first, or undo that")
        if refused:
            return refused
        if "bias" in self._slots(site) and site.bias is None:
            if not site.bias_is_computed:
                return "it has no bias, of which the checkpoint has another value" if self.origin else None
            return "its bias is computed, so it has no copy; leave out --bias"
        return None

    def _slots(self, site: Site) -> tuple[Slot, ...]:
        if self.origin is not None:
            return self.origin.slots.get(site.path, ())
        return ("weight", "bias") if self.bias and (site.bias or site.bias_is_computed) else ("weight",)

    def decide(self, site: Site) -> dict[str, Any]:
        shapes = {
            slot: list(site.probe.tensor(name).shape)
            for slot, name in (("weight", site.weight), ("bias", site.bias))
            if slot in self._slots(site) and name is not None
        }
        return {"shapes": shapes, "own": self.origin is not None and self.origin.at == site.path}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        copies = {
            slot: TensorSpec(tuple(shape), self._copy(site, slot))
            for slot, shape in site.decided["shapes"].items()
        }
        kept = self.origin.specs() if site.decided["own"] and self.origin is not None else {}
        return copies | kept

    def _copy(self, site: Site, slot: str) -> Callable[[Tensor], Any]:
        return lambda tensor: tensor.copy_(
            site.probe.tensor(str(site.weight if slot == "weight" else site.bias))
        )

    def outcome(self, site: Site) -> Outcome:
        if self.origin is None:
            return Outcome()
        return Outcome(note=f"the weight that PEFT merged from its {self.origin.config.get('peft_type')}")

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        if "weight" in site.decided["shapes"]:
            read_instead(g, g["weight"])
        if "bias" in site.decided["shapes"]:
            read_bias_instead(g, g["bias"])
        return None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        return {slot: Become(tensors[slot], weight) for slot in site.decided["shapes"]}
