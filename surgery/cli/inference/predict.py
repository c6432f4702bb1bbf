"""Predictions of a finished model: classes with their probabilities, numbers, or embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from surgery.capture.sentence.modules import EMBEDDING
from surgery.cli.inference.items import Item, rows_of
from surgery.cli.inference.runner import Runner
from surgery.common.errors import LoadError, nearest
from surgery.common.progress import track
from surgery.train.embeddings import Pooling, embedded
from surgery.train.texts import read

Form = Literal["classes", "values", "embedding"]
_WINDOW = 16  # batches whose texts are sorted by length together


@dataclass(frozen=True)
class Question:
    """The output of a model to read, and how.

    Attributes:
        output: name of the output.
        form: what its values are.
        names: class names; empty for numbers and embeddings.
        pooling: how embeddings of tokens become one.
        several: True if an item can have several classes, each with a probability of its own.
    """

    output: str
    form: Form
    names: tuple[str, ...] = ()
    pooling: Pooling = "mean"
    several: bool = False

    def read(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """One row for each item: probabilities of the classes, numbers, or an embedding."""
        if self.form == "embedding":
            return embedded(outputs, self.output, self.pooling, {"inputs": inputs})
        values = outputs[self.output].float()
        if self.form == "values":
            return values.reshape(len(values), -1)
        return values.sigmoid() if self.several else values.softmax(-1)


def question(
    runner: Runner, form: Form | None = None, output: str | None = None, pooling: Pooling = "mean"
) -> Question:
    """Decide which output to read, and how.

    Args:
        runner: the model.
        form: what the user asks for; None decides by the outputs.
        output: name of the output; None decides.
        pooling: how embeddings of tokens become one.

    Raises:
        LoadError: the model has no such output, or its outputs are those of a language model.
    """
    ranks = runner.ranks
    if output is not None and output not in ranks:
        raise LoadError(
            f"{runner.ref} has no output {output!r}{nearest(output, ranks) or '; it has ' + ', '.join(ranks)}"
        )
    hidden = next((name for name in (EMBEDDING, "last_hidden_state", "pooler_output") if name in ranks), None)
    logits = "logits" if "logits" in ranks else next(iter(ranks)) if len(ranks) == 1 else None
    if output is None:
        output = (hidden or logits) if form == "embedding" else (logits or hidden)
    if output is None:
        raise LoadError(
            f"{runner.ref} has the outputs {', '.join(ranks)}; name the one to read with --output"
        )
    problem = getattr(runner.config, "problem_type", None)
    if form is None:
        if output == hidden:
            form = "embedding"
        elif ranks[output] == 2:
            one = runner.setting.widths.get(output) == 1
            form = "values" if one or problem == "regression" else "classes"
        elif ranks[output] == 1:
            form = "values"
        else:
            raise LoadError(
                f"{runner.ref} gives {output!r} for every token; use `surgery generate` for text, or "
                "--as embedding for one vector of each item"
            )
    if form == "classes" and ranks[output] != 2:
        raise LoadError(f"{output!r} of {runner.ref} has {ranks[output]} axes; classes need batch × classes")
    names: tuple[str, ...] = ()
    if form == "classes":
        width = runner.setting.widths.get(output, 0)
        named = runner.setting.labels.get(output, ())
        names = named if len(named) == width else tuple(f"LABEL_{number}" for number in range(width))
    return Question(output, form, names, pooling, problem == "multi_label_classification")


def predict(runner: Runner, asked: Question, items: Sequence[Item], batch: int = 16) -> Iterator[Tensor]:
    """Predict items, in their order.

    Args:
        runner: the model.
        asked: what to read, from `question`.
        items: texts or images.
        batch: items of a batch.

    Yields:
        One row for each item: probabilities by class, numbers, or an embedding.

    Raises:
        SurgeryError: an item cannot be read.
    """
    runner.setting.need_reader("predict")
    setting = replace(runner.setting, columns={"text": "text"})
    for start in range(0, len(items), batch * _WINDOW):
        window = items[start : start + batch * _WINDOW]
        made: list[Any] = [read({"text": item.value}, setting) for item in window]
        order = sorted(range(len(made)), key=lambda i: len(made[i].get("input_ids", ())))
        rows: list[Tensor | None] = [None] * len(made)
        for first in track(range(0, len(order), batch), "predicting"):
            chosen = order[first : first + batch]
            inputs = setting.pad([made[i] for i in chosen])
            for place, row in zip(chosen, asked.read(runner(inputs), inputs), strict=True):
                rows[place] = row
        yield from (row for row in rows if row is not None)
    runner.setting.counts.update(setting.counts)


def predict_arrays(
    runner: Runner, asked: Question, inputs: Mapping[str, Tensor], batch: int = 16
) -> Iterator[Tensor]:
    """Predict rows of arrays, in their order.

    Args:
        runner: the model.
        asked: what to read, from `question`.
        inputs: the model's inputs by name, with rows along the first axis.
        batch: rows of a batch.
    """
    for start in range(0, len(next(iter(inputs.values()))), batch):
        part = rows_of(inputs, start, start + batch)
        yield from asked.read(runner(part), part)


def best(row: Tensor, names: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The classes with the highest probabilities.

    Args:
        row: probability of each class.
        names: names of the classes.
        count: number of classes.
    """
    values, places = torch.topk(row, min(count, len(row)))
    return [(names[int(place)], float(value)) for place, value in zip(places, values, strict=True)]
