"""regression: predict one or several numbers for a text or an image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting
from surgery.train.objective import Batch, Objective, output, run
from surgery.train.texts import TEXT_OR_IMAGE, read


class Regression(Objective):
    """Regression: the mean squared error of the outputs (batch × values) against numbers.

    The label column contains one number per row, or lists as long as the model's output. The metrics are the mean
    squared error and Pearson's correlation, averaged over the values. The best checkpoint has the smallest error.
    """

    name: ClassVar[str] = "regression"
    example: ClassVar[str] = (
        "surgery train hf:google-bert/bert-base-uncased --task text-classification --model-kwarg "
        "num_labels=1 --objective regression --data ratings.csv -o stars/"
    )
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": TEXT_OR_IMAGE,
        "label": ("label", "labels", "rating", "score", "target", "value", "y"),
    }

    heads: ClassVar[tuple[str, ...]] = ("text-classification", "image-classification", "audio-classification")

    text: str | None = Field(default=None, description="column of the text or image")
    label: str | None = Field(default=None, description="column of the number or numbers")
    output: str = Field(default="logits", description="output of the model to fit")

    def outputs_for(self, rows: Any) -> int | None:
        values = rows[self.columns(rows.column_names)["label"]]
        first = next(iter(values), 0.0)
        return len(first) if isinstance(first, list) else 1

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        setting.need_reader(self.name)
        column, width = setting.columns["label"], setting.width(self.output, self.name)
        for number, value in enumerate(rows[column]):
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                raise TrainingError(
                    f"row {number}: {column} is {value!r}, which is not a finite number; fix the data"
                )
            if len(values) != width:
                raise TrainingError(
                    f"row {number}: {column} has {len(values)} numbers, but the model's {self.output!r} has {width}; "
                    f"add another head with --pass head --labels {len(values)}"
                )
        return {}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        value = row[setting.columns["label"]]
        yield {
            **read(row, setting),
            "label": [float(v) for v in (value if isinstance(value, list) else [value])],
        }

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        return {"inputs": setting.pad(examples), "labels": torch.tensor([e["label"] for e in examples])}

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(output(run(module, batch), self.output).float(), batch["labels"])

    def terms(self, batch: Batch) -> int:
        return batch["labels"].numel()

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"said": output(run(module, batch), self.output).float(), "labels": batch["labels"]}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        said, labels = observed["said"].double(), observed["labels"].double()
        a, b = said - said.mean(0), labels - labels.mean(0)
        scale = (a.square().sum(0) * b.square().sum(0)).sqrt()
        pearson = torch.where(scale > 0, (a * b).sum(0) / scale, 0.0)
        return {"loss": float(F.mse_loss(said, labels)), "pearson": float(pearson.mean())}
