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

    Labels are integers from 0, or names. Names have the numbers that the model's own class names have. If it has none
    of them, they are numbered in sorted order and become the model's. The output must have at least as many classes.
    The metrics are accuracy and macro-averaged F1. The best checkpoint has the highest accuracy.
    """

    name: ClassVar[str] = "classification"
    example: ClassVar[str] = (
        "surgery train hf:google-bert/bert-base-uncased --objective classification --data reviews.csv "
        "-o sentiment/"
    )
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": TEXT_OR_IMAGE,
        "label": ("label", "labels", "class", "target", "sentiment", "category", "y"),
    }
    metric: ClassVar[str] = "accuracy"
    larger: ClassVar[bool] = True

    heads: ClassVar[tuple[str, ...]] = ("text-classification", "image-classification", "audio-classification")

    text: str | None = Field(default=None, description="column of the text or image")
    label: str | None = Field(default=None, description="column of the label")
    output: str = Field(default="logits", description="output of the model that contains the logits")
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")

    def outputs_for(self, rows: Any) -> int | None:
        found = {value for value in rows[self.columns(rows.column_names)["label"]] if value is not None}
        numbers = [value for value in found if isinstance(value, int | float) and value == value]
        return max(2, len(found) if len(numbers) < len(found) else 1 + int(max(numbers, default=0)))

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
        if any(isinstance(value, str) for value in found):
            return {"labels": self._names(found, classes, setting)}
        for value, row in found.items():
            shown = int(value) if float(value).is_integer() else value
            if not isinstance(shown, int) or not 0 <= shown < classes:
                raise TrainingError(
                    f"row {row}: {column} is {shown!r}, but the model's {self.output!r} has the classes 0 to "
                    f"{classes - 1}"
                )
        return {"labels": None}

    def _names(self, found: Mapping[Any, int], classes: int, setting: Setting) -> list[str]:
        """Return the name of each class, by its number: the model's own names if it has these, else sorted.

        Args:
            found: first row of each label in the data.
            classes: number of classes of the model.
            setting: data context.

        Raises:
            TrainingError: a label is no name, there are too many, or the model has some of the names and lacks others.
        """
        column = setting.columns["label"]
        for value, row in found.items():
            if not isinstance(value, str):
                raise TrainingError(
                    f"row {row}: {column} is {value!r}, and other rows have names; use one kind of label"
                )
        known = setting.labels.get(setting.output_of(self.output, self.name), ())
        lacking = sorted(name for name in found if name not in known)
        if not lacking:
            return list(known)
        # A label that got another number than before would be trained against what the model knows.
        if len(lacking) < len(found):
            raise TrainingError(
                f"column {column!r} has the label {lacking[0]!r}, and the model's classes are {', '.join(known)}; "
                f"rename it, or replace the head with --pass head --labels {len({*known, *lacking})}"
            )
        if len(found) > classes:
            raise TrainingError(
                f"column {column!r} has {len(found)} labels, but the model's {self.output!r} has {classes} "
                f"classes; add a wider head with --pass head --labels {len(found)}"
            )
        return [*sorted(found), *(f"LABEL_{number}" for number in range(len(found), classes))]

    def labels(self, setting: Setting) -> dict[str, tuple[str, ...]]:
        names = setting.decided.get("labels")
        return {setting.output_of(self.output, self.name): tuple(names)} if names else {}

    def notes(self, setting: Setting) -> list[str]:
        said = super().notes(setting)
        before = setting.labels.get(setting.output_of(self.output, self.name))
        now = setting.decided.get("labels")
        if before and now and list(before) != list(now):
            said.append(f"the data's classes replace the model's: {', '.join(before)}")
        return said

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
