"""How training goes, whatever the objective: the options of `surgery train`."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from surgery.common.errors import SurgeryError, TrainingError
from surgery.common.options import Configured


class Settings(Configured):
    """A step is one update of the weights, of `batch` × `accumulate` examples in each process."""

    kind: ClassVar[str] = "training"
    failure: ClassVar[type[SurgeryError]] = TrainingError

    epochs: float = Field(3.0, gt=0, description="how often the data is read")
    steps: int | None = Field(None, gt=0, description="how many steps, in place of --epochs")
    batch: int = Field(16, gt=0, description="examples of a batch")
    accumulate: int = Field(1, gt=0, description="batches whose gradients make one step")
    lr: float = Field(3e-4, gt=0, description="highest learning rate")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="of the learning rate to 0")
    warmup: float = Field(
        0.1, ge=0, description="steps in which the rate rises from 0: a share below 1, or a number"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, of weight matrices")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: any")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision of the forward pass")
    form: Literal["auto", "live", "graph"] = Field(
        "auto",
        description="what runs: the live transformers model, or the program's graph (auto: live where that can hold "
        "the passes)",
    )
    checkpointing: bool = Field(
        False, description="gradient checkpointing of the live model: less memory, more time"
    )
    max_length: int = Field(512, gt=1, description="most tokens of an example")
    evaluate: int | None = Field(None, gt=0, description="steps between evaluations (default: an epoch)")
    patience: int | None = Field(
        None, gt=0, description="stop after so many evaluations that are no better than the best"
    )
    checkpoint: int | None = Field(
        None, gt=0, description="steps between checkpoints beside those of evaluations"
    )
    regularize: tuple[str, ...] = Field(
        (), description="a penalty: l1=STRENGTH@TARGET, or group-lasso=STRENGTH@TARGET over filters"
    )
    seed: int = Field(0, ge=0, description="of the order of the data, of dropout, and of the split")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step over the highest one."""
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - warmup)
        if self.decay == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1 - done if self.decay == "linear" else 1.0
