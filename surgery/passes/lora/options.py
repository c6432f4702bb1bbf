"""The options of LoRA, which its pass and its variants read."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from surgery.engine.contract.base import RewritePass
from surgery.graph.ops import CONV
from surgery.graph.sites import Site


class LoraOptions(RewritePass):
    """The pass without its methods, so that a variant can read its options. Users meet `Lora`, a subclass."""

    name: ClassVar[str] = "lora"
    example: ClassVar[str] = (
        'surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass lora --target "attn.*" --rank 8 -o adapted/'
    )

    rank: int = Field(default=8, gt=0, description="inner dimension r of the update")
    alpha: float = Field(default=16.0, gt=0, description="the update is scaled by alpha / rank")
    parts: str | None = Field(
        default=None, description="parts of a fused projection: q,k,v (default: all, as one)"
    )
    rslora: bool = Field(default=False, description="scale by alpha / √rank instead")
    dora: bool = Field(default=False, description="train a magnitude for each output beside the direction")
    full_gradient: bool = Field(
        default=False, description="with --dora: let the gradient pass through the norm too"
    )
    bias: bool = Field(default=False, description="a trained bias of B, scaled as the update is")
    across: bool = Field(
        default=False, description="in a grouped convolution A reads the channels of all groups, as in PEFT"
    )
    init: Literal["kaiming", "gaussian", "pissa"] = Field(
        default="kaiming",
        description="how A and B start: A at random and B zero, or W's largest singular values",
    )
    svd_iterations: int = Field(
        default=0, ge=0, description="power iterations of PiSSA's randomized SVD (0: full)"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="probability of dropping a branch input, in training"
    )

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def crosses(self, site: Site) -> bool:
        """True if A of this grouped convolution reads the channels of all groups."""
        return self.across and site.kind == CONV and site.groups > 1
