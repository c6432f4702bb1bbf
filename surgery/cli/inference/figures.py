"""Figures of classes and numbers: the confusion matrix, per-class precision and recall, errors of a regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class.

    Attributes:
        name: name of the class.
        precision: share of correct ones among the items that the model puts into the class; 0 if it puts none.
        recall: share of the items of the class that the model finds; 0 if there are none.
        f1: harmonic mean of both.
        support: items of the class.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ClassReport:
    """Figures of a classification.

    Attributes:
        classes: figures of each class, by its number.
        confusion: items by actual class (rows) and predicted class (columns).
    """

    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(logits: Tensor, labels: Tensor, names: Sequence[str]) -> ClassReport:
        """Count predictions.

        Args:
            logits: items × classes.
            labels: actual class of each item.
            names: name of each class.
        """
        width = logits.shape[-1]
        pairs = labels.long() * width + logits.argmax(-1)
        counts = torch.bincount(pairs, minlength=width * width).view(width, width)
        right, actual, said = counts.diagonal(), counts.sum(1), counts.sum(0)
        figures = []
        for number in range(width):
            hits, found, there = int(right[number]), int(said[number]), int(actual[number])
            figures.append(
                ClassFigures(
                    names[number] if number < len(names) else f"LABEL_{number}",
                    hits / found if found else 0.0,
                    hits / there if there else 0.0,
                    2 * hits / (found + there) if found + there else 0.0,
                    there,
                )
            )
        return ClassReport(tuple(figures), tuple(tuple(map(int, row)) for row in counts.tolist()))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-compatible values."""
        return {
            "classes": [vars(each) for each in self.classes],
            "confusion": [list(row) for row in self.confusion],
        }


def regression_figures(said: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean absolute error and R² of numbers, averaged over the columns.

    Args:
        said: predicted numbers, items × values.
        labels: actual numbers.

    Returns:
        `mae`, and `r2`: 1 − squared error / squared deviation from the mean. A column that does not vary has the R² 1
        if it is predicted exactly, and 0 otherwise, as scikit-learn defines it.
    """
    said, labels = said.double(), labels.double()
    error = (said - labels).square().sum(0)
    spread = (labels - labels.mean(0)).square().sum(0)
    r2 = torch.where(
        spread > 0, 1 - error / spread.clamp_min(1e-300), torch.where(error == 0, 1.0, 0.0).double()
    )
    return {"mae": float((said - labels).abs().mean()), "r2": float(r2.mean())}
