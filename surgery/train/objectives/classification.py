"""classification: assign a text or an image to one of several classes."""

from __future__ import annotations

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


class Classification(Objective):
    """Classification: the cross-entropy of logits (batch × classes) with one label per text or image.

    Labels are integers from 0, or names, which are numbered in sorted order. The output must have at least as many
    classes. The metrics are accuracy and macro-averaged F1. The best checkpoint has the highest accuracy.
    """

    name: ClassVar[str] = "classification"
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": TEXT_OR_IMAGE,
        "label": ("label", "labels", "class", "target", "sentiment", "category", "y"),
    }
    metric: ClassVar[str] = "accuracy"
    larger: ClassVar[bool] = True

    text: str | None = Field(None, description="column of the text or image")
    label: str | None = Field(None, description="column of the label")
    output: str = Field("logits", description="output of the model that contains the logits")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        setting.need_reader(self.name)
        column = setting.columns["label"]
        classes = setting.width(self.output, self.name)
        found: dict[Any, int] = {}  # first row of each label, for errors
        for row, value in enumerate(rows[column]):
            if value is None or value != value:
                raise TrainingError(f"row {row} has no {column!r}; add a label")
            if not isinstance(value, str | int | float):
                raise TrainingError(
                    f"row {row}: {column} is {value!r}, which is not a label; give a name or an integer"
                )
            found.setdefault(value, row)
        if all(isinstance(value, str) for value in found):
            if len(found) > classes:
                raise TrainingError(
                    f"column {column!r} has {len(found)} labels, but the model's {self.output!r} has {classes} "
                    f"classes; add a wider head with --pass head --labels {len(found)}"
                )
            return {"labels": sorted(found)}
        for value, row in found.items():
            shown = int(value) if float(value).is_integer() else value
            if not isinstance(shown, int) or not 0 <= shown < classes:
                raise TrainingError(
                    f"row {row}: {column} is {shown!r}, but the model's {self.output!r} has the classes 0 to "
                    f"{classes - 1}"
                )
        return {"labels": None}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        names, value = setting.decided["labels"], row[setting.columns["label"]]
        yield {**read(row, setting), "label": names.index(value) if names else int(value)}

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        return {"inputs": setting.pad(examples), "labels": torch.tensor([e["label"] for e in examples])}

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        logits = output(run(module, batch), self.output)
        return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.smoothing)

    def terms(self, batch: Batch) -> int:
        return len(batch["labels"])

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"logits": output(run(module, batch), self.output).float(), "labels": batch["labels"]}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        logits, labels = observed["logits"], observed["labels"]
        said = logits.argmax(-1)
        return {
            "loss": float(F.cross_entropy(logits, labels, label_smoothing=self.smoothing)),
            "accuracy": float((said == labels).double().mean()),
            "f1": _macro_f1(said, labels),
        }


def _macro_f1(said: Tensor, labels: Tensor) -> float:
    """Return the F1 score, 2 · correct / (predicted + actual), averaged over the classes that occur."""
    scores = []
    for label in torch.cat([said, labels]).unique():
        right = ((said == label) & (labels == label)).sum()
        scores.append(2 * right / ((said == label).sum() + (labels == label).sum()))
    return float(torch.stack(scores).double().mean())
