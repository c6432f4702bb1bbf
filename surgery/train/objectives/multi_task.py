"""multi-task: train several heads of one program, each with its own data and loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Generator, Tensor, nn

from surgery.common.errors import SurgeryError, TrainingError, nearest
from surgery.train.data_context import Row, Setting
from surgery.train.learned import LEARNED, Learned
from surgery.train.nested_objective import Nested, nested_of, score_of, under
from surgery.train.objective import Batch, Objective
from surgery.train.objectives.regression import Regression
from surgery.train.tables import names_in, part_of, row_of

if TYPE_CHECKING:
    from surgery.engine.program import Program
    from surgery.train.examples import Examples

NAME = re.compile(r"[A-Za-z0-9_]+")


class Task(Nested):
    """A task of a multi-task training.

    Attributes:
        name: name of the task, of its data and of its head.
    """

    name: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        name, equals, rest = given.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise ValueError("write NAME=OBJECTIVE,OPTION=VALUE,…; NAME consists of letters, digits and _")
        return {"name": name, **nested_of(rest)}


class MultiTask(Objective):
    """Multi-task learning (Caruana 1997): a program with several heads, each trained on its own task.

    `--task NAME=OBJECTIVE[,OPTION=VALUE…]` defines a task, and `--data NAME=FILE` its data. Its head is the output
    `logits_NAME` (`--pass head --mode add --head-name NAME`), unless `output=…` names another one. In a recipe `task`
    is a mapping, {film: classification, tweets: {objective: regression, label: rating}}.

    Each batch belongs to one task. A data set of n examples gets the share n^(1/T) / Σ n^(1/T) of an epoch's batches
    (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2). At --temperature 1 the shares are proportional to the
    sizes, and each example is read once. A higher temperature makes the shares more equal: a small set is read
    several times, and a large set in part, with another part in each epoch. --limit caps the size n of a set.

    --uncertainty learns the weight of each task's loss L from its noise. The weighted loss is e^−s L + s/2, or e^−s
    L/2 + s/2 for regression, where s is the logarithm of the noise variance (Kendall et al. 2018, arXiv:1705.07115).
    s starts at 0, trains with --uncertainty-rate times the learning rate, and is saved in checkpoints.

    The metrics are those of each task (NAME/accuracy), the mean of their unweighted losses, and a score: the mean of
    the metrics that select each task's best checkpoint, negated where smaller is better. The best checkpoint has the
    highest score.
    """

    name: ClassVar[str] = "multi-task"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass head --mode "
        "add --head-name stars --labels 1 -o heads/\n"
        "surgery train heads/ --objective multi-task --task film=classification,output=logits --task "
        "stars=regression,output=logits_stars --data film=reviews.csv --data stars=ratings.csv -o "
        "both/"
    )
    metric: ClassVar[str] = "score"
    larger: ClassVar[bool] = True
    several: ClassVar[bool] = True

    task: tuple[Task, ...] = Field(
        default=(), description="task NAME=OBJECTIVE[,OPTION=VALUE…]; may be repeated"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="sampling temperature: 1 is proportional to size, higher is more equal"
    )
    limit: int | None = Field(
        default=None, gt=0, description="maximum size of a data set in the computation of shares"
    )
    uncertainty: bool = Field(default=False, description="learn the weight of each task's loss")
    uncertainty_rate: float = Field(
        default=10.0, gt=0, description="learning rate of the loss weights, as a multiple of the program's"
    )

    @field_validator("task", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        if isinstance(given, str):
            return (given,)
        if isinstance(given, dict):
            return tuple(
                f"{name}={said}" if isinstance(said, str) else _checked(name, said)
                for name, said in given.items()
            )
        return given

    @model_validator(mode="after")
    def _different(self) -> MultiTask:
        names = [task.name for task in self.task]
        if not names:
            raise ValueError("give a --task NAME=OBJECTIVE for each task")
        if len(set(names)) < len(names):
            raise ValueError(
                f"two tasks have the name {next(n for n in names if names.count(n) > 1)!r}; rename one"
            )
        return self

    @cached_property
    def tasks(self) -> dict[str, Objective]:
        """The objective of each task, by name.

        Raises:
            TrainingError: an objective or option is invalid.
        """
        return {t.name: t.made(f"task {t.name!r}", output=f"logits_{t.name}") for t in self.task}

    # -- data

    def prepared(self, rows: Any, setting: Setting) -> Setting:
        there = names_in(rows)
        if not there:
            raise TrainingError(
                f"objective {self.name!r} needs data for each task; give --data NAME=FILE for {', '.join(self.tasks)}"
            )
        for name in self.tasks:
            if name not in there:
                raise TrainingError(
                    f"task {name!r} has no data, only {', '.join(there)}; give --data {name}=FILE"
                )
        for name in there:
            if name not in self.tasks:
                hint = nearest(name, self.tasks) or f"; there are {', '.join(self.tasks)}"
                raise TrainingError(f"the data {name!r} has no task of that name{hint}")
        decided = {}
        for name, objective in self.tasks.items():
            self._check_head(name, objective, setting)
            try:
                own = objective.prepared(part_of(rows, name), setting)
            except SurgeryError as error:
                raise type(error)(f"task {name!r}: {error}") from None
            decided[name] = {"columns": dict(own.columns), "decided": dict(own.decided)}
        return replace(setting, decided=decided)

    def labels(self, setting: Setting) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name, objective in self.tasks.items():
            found.update(objective.labels(self._own(setting, name)))
        return found

    def notes(self, setting: Setting) -> list[str]:
        return [
            f"task {name!r}: {said}"
            for name, objective in self.tasks.items()
            for said in objective.notes(self._own(setting, name))
        ]

    def _check_head(self, name: str, objective: Objective, setting: Setting) -> None:
        output = getattr(objective, "output", None)
        if output is not None and output not in setting.widths:
            raise TrainingError(
                f"task {name!r}: the model has no output {output!r}, only {', '.join(setting.widths)}; add one "
                f"with --pass head --mode add --head-name {name}, or name another with output=…"
            )

    def _own(self, setting: Setting, name: str) -> Setting:
        """Return the data context of one task."""
        return replace(setting, **setting.decided[name])

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        name, own = row_of(row)
        objective = self.tasks[name]
        try:
            made = list(objective.examples(own, self._own(setting, name)))
        except SurgeryError as error:
            raise type(error)(f"task {name!r}: {error}") from None
        # Tasks have examples with different fields, but a table needs one set of columns. So they are stored as JSON.
        yield from ({"task": name, "size": objective.size(e), "example": json.dumps(e)} for e in made)

    def size(self, example: Row) -> int:
        return int(example["size"])

    def epoch(self, data: Examples, batch: int, draw: Generator | None) -> list[list[int]]:
        places: dict[str, list[int]] = {}
        for number, name in enumerate(data.examples["task"]):
            places.setdefault(name, []).append(number)
        if draw is None:
            return [
                own[i : i + batch]
                for numbers in places.values()
                for own in [sorted(numbers, key=data.sizes.__getitem__)]
                for i in range(0, len(own), batch)
            ]
        ready: list[list[int]] = []
        for name, count in self.shares({n: len(numbers) for n, numbers in places.items()}, batch).items():
            numbers, objective = places[name], self.tasks[name]
            sizes = [data.sizes[i] for i in numbers]
            chosen: list[list[int]] = []
            while len(chosen) < count:
                chosen += objective.batches(sizes, batch, draw)
            ready += [[numbers[i] for i in each] for each in chosen[:count]]
        return [ready[i] for i in torch.randperm(len(ready), generator=draw).tolist()]

    def shares(self, sizes: Mapping[str, int], batch: int) -> dict[str, int]:
        """Return the number of batches of each task in an epoch, at least one.

        Args:
            sizes: number of examples of each task.
            batch: examples per batch.
        """
        full = {name: -(-size // batch) for name, size in sizes.items()}
        if self.temperature == 1 and self.limit is None:
            return full
        counted = {
            name: min(size, self.limit or size) ** (1 / self.temperature) for name, size in sizes.items()
        }
        whole = sum(full.values()) / sum(counted.values())
        return {name: max(1, round(whole * part)) for name, part in counted.items()}

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        names = {example["task"] for example in examples}
        if len(names) > 1:
            raise TrainingError(
                f"the batch mixes tasks {', '.join(sorted(names))}; use the batches of `epoch`, which have one "
                f"task each"
            )
        (name,) = names
        rows = [json.loads(example["example"]) for example in examples]
        return {**self.tasks[name].collate(rows, self._own(setting, name), draw), "task": name}

    # -- losses

    def companions(self, program: Program) -> Mapping[str, nn.Module]:
        return {LEARNED: TaskNoise(self.tasks, self.uncertainty_rate)} if self.uncertainty else {}

    def complete(self, batch: Batch, companions: Mapping[str, nn.Module]) -> Batch:
        return {**batch, LEARNED: companions[LEARNED]} if self.uncertainty else batch

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        name = batch["task"]
        objective = self.tasks[name]
        value = objective.loss(module, batch)
        # If the program gets no gradient, return the plain loss: the gradient of the task weight would hide that.
        if not self.uncertainty or (torch.is_grad_enabled() and not value.requires_grad):
            return value
        return batch[LEARNED](name, value / 2 if isinstance(objective, Regression) else value)

    def terms(self, batch: Batch) -> int:
        return self.tasks[batch["task"]].terms(batch)

    # -- held-out data

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        name = batch["task"]
        seen = {f"{name}/{key}": v for key, v in self.tasks[name].observe(module, batch).items()}
        if self.uncertainty:
            seen[f"{name}/"] = batch[LEARNED].weight(name).reshape(1)
        return seen

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        figures, losses, scores = {}, [], []
        for name, objective in self.tasks.items():
            own = under(f"{name}/", observed)
            weight = own.pop("", None)
            found = objective.metrics(own)
            losses.append(found["loss"])
            scores.append(score_of(objective, found))
            figures.update({f"{name}/{key}": value for key, value in found.items()})
            if weight is not None:
                figures[f"{name}/weight"] = float(weight[-1])
        return {"loss": sum(losses) / len(losses), "score": sum(scores) / len(scores), **figures}


def _checked(name: str, said: Any) -> dict[str, Any]:
    """Return the mapping of a task in a recipe, with its name.

    Raises:
        ValueError: the mapping names no objective.
    """
    if not isinstance(said, dict) or not isinstance(said.get("objective"), str):
        raise ValueError(
            f"task {name!r} is invalid; give an objective's name, or a mapping with `objective` and its options"
        )
    return {**said, "name": name}


class TaskNoise(Learned):
    """Learned noise of each task: s, the logarithm of the variance."""

    def __init__(self, names: Iterable[str], rate: float = 1.0) -> None:
        """Start with s = 0 for each task.

        Args:
            names: names of the tasks.
            rate: learning rate, as a multiple of the program's.
        """
        super().__init__()
        self.rate = rate
        self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    def forward(self, name: str, loss: Tensor) -> Tensor:
        """Return the weighted loss of a task."""
        s = self.log_variance[name]
        return torch.exp(-s) * loss + s / 2

    def weight(self, name: str) -> Tensor:
        """Return the factor of a task's loss."""
        return torch.exp(-self.log_variance[name])
