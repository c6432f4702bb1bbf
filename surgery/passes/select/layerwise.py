"""Layerwise: a range of depth trains, each depth at its own rate, or one depth after another."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from surgery.common.errors import PassError
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection
from surgery.engine.schedule import Window


class Layerwise(SelectPass):
    """Train some depths of a model, and nothing else of the base.

    Depth is told from the dataflow: 0 is what takes the input in (embeddings, the stem), 1 to n are the repeated
    blocks, n + 1 is what follows them (the last norm, the head). `--top 4`, `--bottom 2`, `--fraction 0.5` (of the
    blocks, from `--end top` or bottom, rounded up) or `--layers 2-5,8` choose blocks; the head trains along unless
    `--freeze-head`, the embeddings with `--bottom`, `--layers 0-…` or `--embeddings`. With none of these, every
    depth trains.

    Layer-wise decay (Howard & Ruder 2018, arXiv:1801.06146; ELECTRA, arXiv:2003.10555): depth d trains at
    decay^(n + 1 − d) of the optimiser's rate. `--one-at-a-time --steps N`: the chosen depths train one after another
    for N steps each, from the top down, the last of them for good (chain-thaw, Felbo et al. 2017,
    arXiv:1708.00524); call `module.advance(step)`. A weight that is used at two depths (tied embeddings) is at the
    lower. A model that repeats no block has a depth for each weight on the longest way through it. Adapters train
    as before. Outputs do not change.
    """

    name: ClassVar[str] = "layerwise"
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    layers: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="depths that train, such as 2-5,8; the first block is 1",
    )
    top: int | None = Field(None, gt=0, description="the last so many blocks train")
    bottom: int | None = Field(None, gt=0, description="the first so many blocks and the embeddings train")
    fraction: float | None = Field(None, gt=0, le=1, description="this share of the blocks trains")
    end: Literal["top", "bottom"] = Field("top", description="where --fraction counts from")
    freeze_head: bool = Field(False, description="what follows the last block does not train")
    embeddings: bool = Field(False, description="what precedes the first block trains too")
    decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of a depth over that of the one above it"
    )
    one_at_a_time: bool = Field(False, description="one depth at a time, from the top down")
    steps: int | None = Field(None, gt=0, description="how long each depth trains, one at a time")
    unit: Literal["step", "epoch"] = Field("step", description="what --steps counts")

    @model_validator(mode="after")
    def _consistent(self) -> Layerwise:
        ranges = [f"--{n}" for n in ("layers", "top", "bottom", "fraction") if getattr(self, n) is not None]
        if len(ranges) > 1:
            raise ValueError(f"{' and '.join(ranges)} each choose the depths; give one of them")
        if self.one_at_a_time and self.steps is None:
            raise ValueError("--one-at-a-time needs --steps, how long each depth trains")
        if self.steps is not None and not self.one_at_a_time:
            raise ValueError("--steps is how long each depth trains with --one-at-a-time; add that")
        if self.end != "top" and self.fraction is None:
            raise ValueError("--end says where --fraction counts from; add that, or give --bottom")
        if self.unit != "step" and not self.one_at_a_time:
            raise ValueError("--unit is what --steps counts, with --one-at-a-time; add these")
        return self

    def selection(self, candidates: Candidates) -> Selection:
        by_depth = candidates.by_depth
        chosen = [d for d in by_depth if d in self._depths(candidates)]
        names = [name for d in chosen for name in by_depth[d]]
        if not names:
            raise PassError("layerwise: nothing that the target names is at the depths that are to train")
        windows: dict[str, Window] = {}
        if self.one_at_a_time and self.steps is not None:
            for index, depth in enumerate(chosen):
                last = None if index == len(chosen) - 1 else (index + 1) * self.steps
                windows.update(dict.fromkeys(by_depth[depth], (index * self.steps, last)))
        rates = candidates.rates(names, self.decay)
        return Selection(candidates.only(set(names)), rates, windows, self.unit)

    def _depths(self, candidates: Candidates) -> set[int]:
        head = candidates.deepest
        blocks = head - 1
        if self.layers is not None:
            chosen = self._listed(head)
        elif self.fraction is not None:
            count = math.ceil(self.fraction * blocks - 1e-9)  # 0.3 · 10 is a little over 3
            chosen = _blocks(count, 0, blocks) if self.end == "top" else _blocks(0, count, blocks)
        elif self.top is not None or self.bottom is not None:
            asked = self.top or self.bottom or 0
            if asked > blocks:
                raise PassError(f"layerwise: {asked} blocks are to train; the model has {_blocks_of(head)}")
            chosen = _blocks(self.top or 0, self.bottom or 0, blocks)
        else:
            chosen = set(range(head + 1))
        if self.bottom is not None or (self.fraction is not None and self.end == "bottom") or self.embeddings:
            chosen.add(0)
        if self.freeze_head:
            chosen.discard(head)
        else:
            chosen.add(head)
        return chosen

    def _listed(self, head: int) -> set[int]:
        chosen: set[int] = set()
        for part in str(self.layers).split(","):
            first, dash, last = (piece.strip() for piece in part.partition("-"))
            if not first.isdigit() or (dash and not last.isdigit()):
                raise PassError(
                    f"layerwise: --layers {self.layers!r}: write depths and ranges, such as 2-5,8"
                )
            low, high = int(first), int(last or first)
            if low > high or high > head:
                raise PassError(
                    f"layerwise: --layers {part.strip()}: the blocks of the model are {_blocks_of(head)}"
                )
            chosen.update(range(low, high + 1))
        return chosen


def _blocks(top: int, bottom: int, blocks: int) -> set[int]:
    return {*range(blocks - top + 1, blocks + 1), *range(1, bottom + 1)}


def _blocks_of(head: int) -> str:
    if head < 2:
        return "none between its embeddings (depth 0) and its head (depth 1)" if head else "one depth only, 0"
    return f"{head - 1}: depths 0 (embeddings), 1 to {head - 1} (blocks) and {head} (the head)"
