"""expand: a program becomes deeper, wider, or gets trained branches beside its ops, and computes what it did."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from surgery.common.errors import PassError
from surgery.engine.contract.base import GraphPass
from surgery.engine.contract.numerics import EXACT, Numerics, rounded
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import EXPERTS, LINEAR
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.targets import select_sites
from surgery.graph.view import View
from surgery.passes.expand import depth, width
from surgery.passes.expand import side as beside

# Measured in fp32 at ×1.5: at most 7.9e-7 on MiniLM and SmolLM2 (2 layers each), tiny T5, ViT and wav2vec2, ResNet-18.
# The other dtypes, and greater depth, are not measured yet.
SUMS_ANEW = rounded(
    1e-4,
    "a unit's outgoing weights are split among its copies, and their products summed in another order",
    {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1},
)
_OWN = {
    "deeper": ("after", "row"),
    "wider": ("noise",),
    "side": ("size", "kernel", "activation", "causal"),
}


class Expand(GraphPass):
    """Expansion: more blocks, wider hidden layers, or branches beside ops, computing at insertion what there was.

    `--deeper N` (block expansion, LLaMA Pro: Wu et al. 2024, arXiv:2401.02415) puts N copies of whole blocks into a
    row of repeated blocks: the row is split into N parts, and the last block of each is followed by its copy. Rows are
    found by dataflow from the residual adds (layers of an encoder or decoder, blocks of a ResNet). Taken is the longest
    (of several the last: a decoder's), --row, or what holds a targeted weight. `--after 3,7` names blocks.
    A copy has weights of its own (of attention, MLP, experts, norms; running statistics too), which start as the
    block's, and shares with it masks, tables of positions, an encoder's output. It is the identity bit for bit: the
    last projection of each residual branch is zero, W and b, or the norm after it, γ and β, in a ResNet. Where that is
    none (a norm follows the add: BERT) the copy is gated, y = x + g ⊙ (block(x) − x), with one trained number g = 0 for
    each feature (ReZero: Bachlechner et al. 2020, arXiv:2003.04887); which of the two was found by trying it, and is in
    the journal. A block that changes the stream's shape, or projects its shortcut, cannot be copied.
    A weight w mixes: y = x + w·(copy(x) − x).

    `--wider 1.5` or `--wider +64` (Net2WiderNet: Chen et al. 2016, arXiv:1511.05641) widens hidden layers: of an MLP
    (up, gate, fused gate_up; down), and the channels between the convolutions of a residual branch, with the batch
    norms between; all of these, or those that the target names by the op that makes the units or takes them in. Added
    units repeat others, chosen at random; of one unit the outgoing weights are split among its copies:
    W_up' = W_up[m], W_down'[:, j] = s_j · W_down[:, m_j], where s adds up to 1 over the copies of a unit. The split
    is even but for `noise`, without which copies would get equal gradients for good. The sum is what it was, up to
    rounding: 1e-4 of the outputs' scale is allowed in fp32 (1e-12 in fp64, 2e-2 in fp16, 1e-1 in bf16). The wider
    weights stand in the place of the old, which are not run or counted any more. Grouped and depthwise convolutions,
    units that are normed together or read elsewhere, and stacked experts are refused.

    `--side dense` adds y + B σ(A x + a) + b beside targeted linears and convolutions, A (size × in) at random, B
    (out × size), a and b zero. `--side conv` lets the branch see neighbours: of a convolution, A has its kernel, or
    --kernel, stride and dilation, padded to the same positions, and B is a zero convolution of 1×1 (ControlNet: Zhang
    et al. 2023, arXiv:2302.05543); of a linear on a sequence, a depthwise convolution over the sequence lies between A
    and σ, which looks only back unless the attention of the site's blocks is seen to look ahead, or --causal says so.

    What is added trains, and the base is frozen. Copies and wider weights are targets of later passes, under the
    block's name: layers.3.expand_1.mlp.up, layers.3.mlp.up.expand. There is no merged form.
    """

    name: ClassVar[str] = "expand"

    deeper: int | None = Field(
        None, gt=0, description="add this many copies of blocks, spread evenly over the row"
    )
    after: str | None = Field(
        None,
        description="deeper: the blocks to copy, by their numbers in the row: 3,7 (once each, without --deeper)",
    )
    row: int | None = Field(
        None,
        ge=0,
        description="deeper: which row of blocks, in order (default: the longest, or the last of these)",
    )
    wider: str | None = Field(
        None, description="times as many units in hidden layers (1.5), or so many more (+64)"
    )
    noise: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="wider: how unevenly copies of a unit share its outgoing weights (0: evenly)",
    )
    side: Literal["dense", "conv"] | None = Field(
        None, description="add a branch beside the targeted ops: a bottleneck, or one with a convolution"
    )
    size: int = Field(64, gt=0, description="side: width of the bottleneck")
    kernel: int | None = Field(
        None, gt=0, description="side conv: kernel size (default: the convolution's own; 3 along a sequence)"
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="side: σ")
    causal: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="side conv along a sequence: whether it sees only what came before (auto: as the attention)",
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
                f"pass 'expand': give one of --deeper (or --after), --wider and --side; it has {had}"
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
                f"pass 'expand': --wider {self.wider!r} is no growth; write a factor over 1 (1.5), or +64 for 64 more"
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
        return next(name for name, asked in self._asked().items() if asked)

    def _blocks(self) -> tuple[int, ...] | None:
        if self.after is None:
            return None
        if not re.fullmatch(r"\d+(\s*,\s*\d+)*", self.after):
            raise PassError(
                f"pass 'expand': --after {self.after!r} is no list of blocks; write their numbers: 3,7"
            )
        return tuple(int(number) for number in self.after.split(","))

    # -- contract

    @property
    def contract(self) -> Numerics:
        return SUMS_ANEW if self._way == "wider" else EXACT

    @property
    def adds_weights(self) -> bool:
        return self._way != "side"

    @property
    def leads(self) -> bool:
        return self._way != "side"

    @property
    def in_place(self) -> bool:
        return self._way == "side"

    def mixes_positions(self, site: Site) -> bool:
        return self.side == "conv" and site.kind == LINEAR

    @property
    def can_weigh(self) -> bool:
        return self._way != "wider"

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
                    "pass 'expand': the model has no MLP and no residual branch of convolutions to widen; name a "
                    "hidden layer with --target, by the op that makes it"
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

    def note(self, site: Site) -> str:
        if self._way == "deeper":
            how = "a gate starts at zero" if site.decided["gate"] else "its last projections are zero"
            return f"a copy of {site.decided['block']} behind it; {how}"
        return ""

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if self._way == "side":
            return beside.tensors(self._branch, site)
        return width.tensors(site, self.noise) if self._way == "wider" else depth.tensors(site)

    def tensor_names(self, site: Site) -> dict[str, str]:
        if self._way == "side":
            return {}
        names = width.tensor_names if self._way == "wider" else depth.tensor_names
        return names(site, self.attribute)

    def rewrite(self, site: Site, g: Rewriter) -> None:
        if self._way == "side":
            beside.rewrite(self._branch, site, g)
        elif self._way == "wider":
            width.rewrite(site, g)
        else:
            depth.rewrite(site, g, self.attribute)

    def keeps(self, site: Site) -> str | None:
        why = {
            "deeper": "blocks that were put in have no place in the base's weights",
            "wider": "its weights have another shape than the base's",
            "side": "a nonlinearity stands between the two maps of a side branch",
        }
        return f"{why[self._way]}; export to ONNX, or save the program"


def _is_more(wider: str) -> bool:
    if re.fullmatch(r"\+\d+", wider):
        return int(wider) > 0
    try:
        return 1 < float(wider) < math.inf
    except ValueError:
        return False
