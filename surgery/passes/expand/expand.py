"""expand: makes a program deeper or wider, or adds trained side branches; the outputs stay the same at insertion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from surgery.common.errors import PassError
from surgery.engine.contract.base import GraphPass, attribute_of
from surgery.engine.contract.effect import ADAPTER, STRUCTURE, Effect
from surgery.engine.contract.numerics import EXACT, Numerics, rounded
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.ops import EXPERTS
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.targets import select_sites
from surgery.graph.view import View
from surgery.passes.expand import depth, width
from surgery.passes.expand import side as beside

# Measured in fp32 at ×1.5: at most 7.9e-7 on MiniLM and SmolLM2 (2 layers each), tiny T5, ViT and wav2vec2, ResNet-18.
# The other dtypes, and deeper models, have not been measured.
REORDERED_SUMS = rounded(
    1e-4,
    "a unit's outgoing weights are split among its copies, and their products summed in another order",
    {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1},
)
_OWN = {
    "deeper": ("after", "row"),
    "wider": ("noise",),
    "side": ("size", "kernel", "activation", "causal"),
}


_MOST_TIMES = 1000


class Expand(GraphPass):
    """Expansion: adds blocks, widens hidden layers, or adds side branches, and computes the same at insertion.

    `--deeper N` (block expansion, LLaMA Pro: Wu et al. 2024, arXiv:2401.02415) inserts N copies of whole blocks into a
    row of repeated blocks. The row is split into N parts, and the last block of each part is followed by its copy. Rows
    (layers of an encoder or decoder, blocks of a ResNet) are found by dataflow from the residual adds. The longest row
    is used (the last one if there are several: a decoder's), or --row, or the blocks that hold a targeted weight.
    `--after 3,7` names blocks. A copy has its own weights (attention, MLP, experts, norms, also running statistics),
    which start as those of the block. It shares masks, position tables and an encoder's output with the block. At first
    it is the identity, bit for bit: the last projection of each residual branch is zero (W and b), or in a ResNet the
    norm after it (γ and β). If that does not give the identity (in BERT a norm follows the add), the copy is gated,
    y = x + g ⊙ (block(x) − x), with one trained number g = 0 for each feature (ReZero: Bachlechner et al. 2020,
    arXiv:2003.04887). The choice is made by running the copy, and is recorded in the journal. A block that changes the
    shape of the stream, or has a projection in its shortcut, cannot be copied. A weight w interpolates:
    y = x + w·(copy(x) − x).

    `--wider 1.5` or `--wider +64` (Net2WiderNet: Chen et al. 2016, arXiv:1511.05641) widens hidden layers: those of an
    MLP (up, gate, fused gate_up; down), and the channels between the convolutions of a residual branch, with the batch
    norms in between. All of these are widened, or those that the target names by the op that produces or reads the
    units. Added units repeat others, chosen at random, and the outgoing weights of a unit are split among its copies:
    W_up' = W_up[m], W_down'[:, j] = s_j · W_down[:, m_j], where s adds up to 1 over the copies of a unit. The split is
    even except for `noise`; without it, copies would always get equal gradients. The output stays the same up to
    rounding: 1e-4 of the outputs' scale is allowed in fp32 (1e-12 in fp64, 2e-2 in fp16, 1e-1 in bf16). The wider
    weights replace the old ones, which are not run or counted any more. Grouped and depthwise convolutions, units that
    are normalized together or read elsewhere, and stacked experts are refused.

    `--side dense` adds B σ(A x + a) + b to the output of targeted linears and convolutions; A (size × in) is random,
    and B (out × size), a and b are zero. With `--side conv` the branch also sees neighbouring positions. For a
    convolution, A has its kernel (or --kernel), stride and dilation, padded to the same positions, and B is a 1×1 zero
    convolution (ControlNet: Zhang et al. 2023, arXiv:2302.05543). For a linear on a sequence, a depthwise convolution
    over the sequence lies between A and σ. It is causal unless the attention of the site's blocks looks ahead, or as
    --causal says.

    Added tensors train, and the base is frozen. Later passes can target copies and wider weights under the block's
    name: layers.3.expand_1.mlp.up, layers.3.mlp.up.expand. There is no merged form.
    """

    name: ClassVar[str] = "expand"
    example: ClassVar[str] = "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass expand --deeper 2 -o deeper/"

    deeper: int | None = Field(
        default=None,
        gt=0,
        le=depth.MOST_COPIES,
        description="number of block copies to add, spread evenly over the row",
    )
    after: str | None = Field(
        default=None,
        description="deeper: indices of the blocks to copy, in their row, such as 3,7 (once each, without --deeper)",
    )
    row: int | None = Field(
        default=None,
        ge=0,
        description="deeper: index of the row of blocks (default: the longest row, or the last of the longest)",
    )
    wider: str | None = Field(
        default=None,
        description="new width of hidden layers: a factor (1.5), or a number of units to add (+64)",
    )
    noise: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="wider: unevenness of the shares of outgoing weights among copies of a unit (0: even)",
    )
    side: Literal["dense", "conv"] | None = Field(
        default=None,
        description="add a branch parallel to the targeted ops: a bottleneck, or one with a convolution",
    )
    size: int = Field(default=64, gt=0, description="side: width of the bottleneck")
    kernel: int | None = Field(
        default=None,
        gt=0,
        description="side conv: kernel size (default: the convolution's own; 3 along a sequence)",
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(
        default="relu", description="side: activation σ"
    )
    causal: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="side conv along a sequence: see only earlier positions (auto: as the attention does)",
    )

    @field_validator("wider", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_way(self) -> Expand:
        given = [name for name, asked in self._asked().items() if asked]
        if len(given) != 1:
            had = " and ".join(f"--{name}" for name in given) or "none"
            raise PassError(
                f"pass 'expand': give one of --deeper (or --after), --wider and --side; given: {had}"
            )
        for way, options in _OWN.items():
            for option in options:
                changed = getattr(self, option) != type(self).model_fields[option].default
                if changed and way != given[0]:
                    raise PassError(f"pass 'expand': --{option} belongs to --{way}, and this is --{given[0]}")
        if self.kernel is not None and self.side == "dense":
            raise PassError("pass 'expand': --kernel belongs to --side conv, and this is --side dense")
        if self.causal != "auto" and self.side == "dense":
            raise PassError("pass 'expand': --causal belongs to --side conv, and this is --side dense")
        if self.wider is not None and not _is_more(self.wider):
            raise PassError(
                f"pass 'expand': --wider {self.wider!r} adds no units; write a factor over 1 (1.5), or +64 for 64 more"
            )
        if self.after is not None:
            self._blocks()
        return self

    def _asked(self) -> dict[str, bool]:
        return {
            "deeper": self.deeper is not None or self.after is not None,
            "wider": self.wider is not None,
            "side": self.side is not None,
        }

    @property
    def _way(self) -> str:
        return next((name for name, asked in self._asked().items() if asked), "deeper")

    def _blocks(self) -> tuple[int, ...] | None:
        if self.after is None:
            return None
        if not re.fullmatch(r"\d+(\s*,\s*\d+)*", self.after):
            raise PassError(
                f"pass 'expand': --after {self.after!r} is not a list of blocks; write their indices: 3,7"
            )
        return tuple(int(number) for number in self.after.split(","))

    # -- contract

    @property
    def numerics(self) -> Numerics:
        return REORDERED_SUMS if self._way == "wider" else EXACT

    @property
    def effect(self) -> Effect:
        if self._way == "side":
            return replace(ADAPTER, scalable=True, mixes_positions=self.side == "conv")
        return replace(STRUCTURE, freezes_base=True, scalable=self._way != "wider")

    # -- where

    def candidates(self, view: View) -> list[Site]:
        if self._way == "deeper":
            return [place.site for place in depth.places(self._request(None), view)]
        if self._way == "wider":
            return [place.site for place in width.places(view, None)]
        return [site for site in view.sites if site.kind in ("linear", "conv")]

    def find(self, view: View) -> list[Site]:
        if self._way == "side":
            if self.target is None:
                raise PassError("pass 'expand': --side needs a target, such as --target 'attn.*'")
            return select_sites(view.sites.sites, self.target)
        if self._way == "wider":
            found = [place.site for place in width.places(view, self.target)]
            if not found and any(site.kind == EXPERTS for site in view.sites):
                raise PassError(
                    "pass 'expand': the model's MLPs are stacked experts, which --wider does not widen; use --side, "
                    "or name another hidden layer with --target"
                )
            if not found:
                raise PassError(
                    "pass 'expand': the model has no MLP and no convolutional residual branch to widen; name a "
                    "hidden layer with --target, by the op that produces its units"
                )
            return found
        places = depth.places(self._request(self.target), view)
        return [*(place.site for place in places), *depth.outside(self.target, view)]

    def _request(self, target: str | None) -> depth.Request:
        return depth.Request(self.deeper, self._blocks(), self.row, target)

    def _depth(self, site: Site) -> depth.Place | None:
        view = site.probe.view
        places = site.probe.once((self, "places"), lambda: depth.places(self._request(self.target), view))
        return next((place for place in places if place.site.key == site.key), None)

    def _width(self, site: Site) -> width.Place:
        view = site.probe.view
        places = site.probe.once((self, "places"), lambda: width.places(view, self.target))
        return next(place for place in places if place.site.key == site.key)

    @property
    def _branch(self) -> beside.Branch:
        assert self.side is not None
        return beside.Branch(self.side, self.size, self.kernel, self.activation, self.causal)

    # -- what

    def check(self, site: Site) -> str | None:
        view = site.probe.view
        if self._way == "side":
            return beside.check(self._branch, site, view)
        if self._way == "wider":
            return width.check(self._width(site), str(self.wider), view)
        place = self._depth(site)
        return (
            depth.check(place, view) if place is not None else "it is in none of the model's repeated blocks"
        )

    def decide(self, site: Site) -> dict[str, Any]:
        view, probe = site.probe.view, site.probe
        if self._way == "side":
            return beside.decide(self._branch, site, view, probe)
        if self._way == "wider":
            return width.decide(self._width(site), str(self.wider), view, probe)
        place = self._depth(site)
        assert place is not None
        return depth.decide(place, view, probe)

    def outcome(self, site: Site) -> Outcome:
        if self._way == "deeper":
            how = "a gate starts at zero" if site.decided["gate"] else "its last projections are zero"
            return Outcome(note=f"adds a copy after {site.decided['block']}; {how}")
        return Outcome()

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if self._way == "side":
            return beside.tensors(self._branch, site)
        return width.tensors(site, self.noise) if self._way == "wider" else depth.tensors(site)

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        found = super().names(site, tensors)
        if self._way == "side":
            return found
        own = (width if self._way == "wider" else depth).tensor_names(site, attribute_of(self))
        return {name: own.get(name, full) for name, full in found.items()}

    def rewrite(self, site: Site, g: Rewriter) -> None:
        if self._way == "side":
            beside.rewrite(self._branch, site, g)
        elif self._way == "wider":
            width.rewrite(site, g)
        else:
            depth.rewrite(site, g, attribute_of(self))

    def why_not_merged(self, site: Site) -> str | None:
        why = {
            "deeper": "the base has no weights for inserted blocks",
            "wider": "its weights have another shape than the base's",
            "side": "a side branch is nonlinear",
        }
        return f"{why[self._way]}; export to ONNX, or save the program"


def _is_more(wider: str) -> bool:
    """True for a factor above 1, or for a number of units to add; both within bounds that memory has."""
    if re.fullmatch(r"\+\d{1,7}", wider):
        return int(wider) > 0
    try:
        return 1 < float(wider) <= _MOST_TIMES
    except ValueError:
        return False
