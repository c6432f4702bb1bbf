"""Options of the training loop that do not depend on the objective (`surgery train`)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from surgery.common.errors import SurgeryError, TrainingError
from surgery.common.options import Configured


class Settings(Configured):
    """Options of a training. One step updates the weights from `batch` × `accumulate` examples in each process."""

    _kind: ClassVar[str] = "training"
    _failure: ClassVar[type[SurgeryError]] = TrainingError

    epochs: float = Field(default=3.0, gt=0, description="number of passes over the data")
    steps: int | None = Field(default=None, gt=0, description="number of steps, instead of --epochs")
    batch: int = Field(default=16, gt=0, description="examples per batch")
    accumulate: int = Field(default=1, gt=0, description="batches per step (gradient accumulation)")
    lr: float | None = Field(
        default=None,
        gt=0,
        description="peak learning rate (default: by what trains and by the width of the model; it is printed)",
    )
    decay: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="decay of the learning rate to 0"
    )
    warmup: float = Field(
        default=0.1,
        ge=0,
        description="warmup of the learning rate from 0: a share of the steps below 1, or a number of steps",
    )
    weight_decay: float = Field(default=0.01, ge=0, description="weight decay of AdamW, on weight matrices")
    clip: float = Field(default=1.0, ge=0, description="maximum norm of the gradient; 0: no clipping")
    precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="mixed precision of the forward pass"
    )
    form: Literal["auto", "live", "graph"] = Field(
        default="auto",
        description="module to train: the live transformers model, or the program's graph (auto: live if it supports "
        "the passes)",
    )
    checkpointing: bool = Field(
        default=False, description="gradient checkpointing of the live model: uses less memory and more time"
    )
    max_length: int = Field(default=512, gt=1, description="maximum tokens of an example")
    evaluate: int | None = Field(
        default=None, gt=0, description="steps between evaluations (default: an epoch)"
    )
    patience: int | None = Field(
        default=None, gt=0, description="stop after this many evaluations without improvement"
    )
    checkpoint: int | None = Field(
        default=None, gt=0, description="steps between checkpoints, in addition to those at evaluations"
    )
    regularize: tuple[str, ...] = Field(
        default=(),
        description="penalty on weights: l1=STRENGTH@TARGET, or group-lasso=STRENGTH@TARGET over filters",
    )
    only: tuple[str, ...] = Field(
        default=(),
        description="adapter to train (default: the one that was applied last); the others keep their values",
    )
    seed: int = Field(default=0, ge=0, description="seed of the data order, dropout and held-out split")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, as a share of the peak.

        Args:
            step: step, counted from 0.
            steps: number of steps of the training.
        """
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - warmup)
        if self.decay == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1 - done if self.decay == "linear" else 1.0
