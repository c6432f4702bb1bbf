"""layerwise: trains a range of depths, with a learning rate for each depth, or one depth after another."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from surgery.common.errors import PassError
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection
from surgery.engine.schedule import Window


class Layerwise(SelectPass):
    """Layer-wise training: only the chosen depths of the base train, optionally with decaying rates or one at a time.

    Depths are found by dataflow: depth 0 is everything before the first block (embeddings, the stem), depths 1 to n are
    the repeated blocks, and n + 1 is everything after them (the last norm, the head). A model without repeated blocks
    has one depth for each weight on the longest path through it. A weight that is used at two depths (tied embeddings)
    belongs to the lower one.

    One of these options chooses blocks: `--top 4`, `--bottom 2`, `--fraction 0.5` (of the blocks, rounded up, counted
    from `--end top` or `bottom`), or `--layers 2-5,8`. The head trains too unless `--freeze-head` is given. The
    embeddings train with `--bottom`, `--end bottom`, `--layers 0-…` or `--embeddings`. If no option chooses blocks,
    every depth trains.

    `--decay` sets layer-wise learning rates (Howard & Ruder 2018, arXiv:1801.06146; ELECTRA, arXiv:2003.10555): depth d
    trains at decay^(n + 1 − d) times the optimizer's rate. With `--one-at-a-time --steps N`, the chosen depths train
    one after another for N steps each, from the top down, and the last one trains until the end (chain-thaw, Felbo et
    al. 2017, arXiv:1708.00524). Call `module.advance(step)` in the training loop. Adapters train as before. Applying
    the pass does not change the outputs.
    """

    name: ClassVar[str] = "layerwise"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass layerwise "
        "--top 1 -o top/"
    )
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    layers: str | None = Field(
        default=None,
        coerce_numbers_to_str=True,
        description="depths that train, such as 2-5,8; the first block is 1",
    )
    top: int | None = Field(
        default=None, gt=0, description="number of blocks at the top (output side) that train"
    )
    bottom: int | None = Field(
        default=None,
        gt=0,
        description="number of blocks at the bottom (input side) that train, with the embeddings",
    )
    fraction: float | None = Field(default=None, gt=0, le=1, description="share of the blocks that trains")
    end: Literal["top", "bottom"] = Field(default="top", description="end from which --fraction counts")
    freeze_head: bool = Field(default=False, description="do not train the layers after the last block")
    embeddings: bool = Field(default=False, description="also train the layers before the first block")
    decay: float = Field(
        default=1.0, gt=0, le=1, description="learning rate of a depth, relative to the depth above it"
    )
    one_at_a_time: bool = Field(default=False, description="train one depth at a time, from the top down")
    steps: int | None = Field(
        default=None, gt=0, description="with --one-at-a-time: steps (or epochs) for each depth"
    )
    unit: Literal["step", "epoch"] = Field(default="step", description="unit of --steps")

    @model_validator(mode="after")
    def _consistent(self) -> Layerwise:
        ranges = [f"--{n}" for n in ("layers", "top", "bottom", "fraction") if getattr(self, n) is not None]
        if len(ranges) > 1:
            raise ValueError(f"{' and '.join(ranges)} each choose depths; give one of them")
        if self.one_at_a_time and self.steps is None:
            raise ValueError("--one-at-a-time needs --steps, the number of steps for each depth")
        if self.steps is not None and not self.one_at_a_time:
            raise ValueError("--steps is for --one-at-a-time; add that, or leave --steps out")
        if self.end != "top" and self.fraction is None:
            raise ValueError("--end is for --fraction; add that, or use --bottom")
        if self.unit != "step" and not self.one_at_a_time:
            raise ValueError("--unit is for --steps with --one-at-a-time; add these, or leave --unit out")
        return self

    def selection(self, candidates: Candidates) -> Selection:
        by_depth = candidates.by_depth
        chosen = [d for d in by_depth if d in self._depths(candidates)]
        names = [name for d in chosen for name in by_depth[d]]
        if not names:
            raise PassError(
                "layerwise: no targeted parameter is at the chosen depths; choose other depths or targets"
            )
        windows: dict[str, Window] = {}
        # The last window stays open, so that training past the last step still updates something.
        if self.one_at_a_time and self.steps is not None:
            for index, depth in enumerate(chosen):
                last = None if index == len(chosen) - 1 else (index + 1) * self.steps
                windows.update(dict.fromkeys(by_depth[depth], (index * self.steps, last)))
        rates = candidates.rates(names, self.decay)
        return Selection(candidates.only(set(names)), rates, windows, self.unit)

    def _depths(self, candidates: Candidates) -> set[int]:
        """Return the depths that train."""
        head = candidates.deepest
        blocks = head - 1
        if self.layers is not None:
            chosen = self._listed(head)
        elif self.fraction is not None:
            # In floating point 0.3 · 10 is slightly above 3, which must not be rounded up to 4.
            count = math.ceil(self.fraction * blocks - 1e-9)
            chosen = _blocks(count, 0, blocks) if self.end == "top" else _blocks(0, count, blocks)
        elif self.top is not None or self.bottom is not None:
            asked = self.top or self.bottom or 0
            if asked > blocks:
                raise PassError(f"layerwise: {asked} blocks are asked for; the model has {_blocks_of(head)}")
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
        """Parse --layers."""
        chosen: set[int] = set()
        for part in str(self.layers).split(","):
            first, dash, last = (piece.strip() for piece in part.partition("-"))
            if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 40:
                raise PassError(
                    f"layerwise: --layers {str(self.layers)[:100]!r}: write depths and ranges, such as 2-5,8"
                )
            low, high = int(first), int(last or first)
            if low > high or high > head:
                raise PassError(
                    f"layerwise: --layers {part.strip()} is not a valid range; the model's blocks are "
                    f"{_blocks_of(head)}"
                )
            chosen.update(range(low, high + 1))
        return chosen


def _blocks(top: int, bottom: int, blocks: int) -> set[int]:
    """Return the depths of so many blocks at the top and at the bottom."""
    return {*range(blocks - top + 1, blocks + 1), *range(1, bottom + 1)}


def _blocks_of(head: int) -> str:
    """Describe the depths of a model whose head is at a depth."""
    if head < 2:
        return "none between its embeddings (depth 0) and its head (depth 1)" if head else "one depth only, 0"
    return f"{head - 1}: depths 0 (embeddings), 1 to {head - 1} (blocks) and {head} (the head)"
