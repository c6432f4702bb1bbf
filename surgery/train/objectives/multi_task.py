"""multi-task: several heads of one program, each with data and a loss of its own."""

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
    """name: of the task, its data and its head."""

    name: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        name, equals, rest = given.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise ValueError("write NAME=OBJECTIVE,OPTION=VALUE,… with a name of letters, digits and _")
        return {"name": name, **nested_of(rest)}


class MultiTask(Objective):
    """Multi-task learning (Caruana 1997): a program with several heads, of which each learns a task of its own.

    `--task NAME=OBJECTIVE[,OPTION=VALUE…]` for each task, and `--data NAME=FILE` for what it learns from; its head is
    the output `logits_NAME` (`--pass head --mode add --head-name NAME`) unless `output=…` names another. In a recipe
    `task` is a mapping, {film: classification, tweets: {objective: regression, label: rating}}.

    A batch is of one task. Of data sets of n examples a share n^(1/T) / Σ n^(1/T) of an epoch's batches is each's
    (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2): in proportion to their size at --temperature 1, when each
    example is read once, and the more alike the higher it is; a small set is then read several times and a large one
    in part, another part in each epoch. --limit is the most examples that a set counts for.

    With --uncertainty a task's loss L is weighed by what is learned of its noise, e^−s L + s/2, and of regression
    e^−s L/2 + s/2, where s is the logarithm of its variance (Kendall et al. 2018, arXiv:1705.07115); s starts at 0, has
    --uncertainty-rate times the learning rate, and is kept in checkpoints. The figures are those of each task
    (NAME/accuracy), their mean loss, without weights, and score: the mean of what each task chooses its best by,
    negative where less is better. The best checkpoint is of the highest score.
    """

    name: ClassVar[str] = "multi-task"
    metric: ClassVar[str] = "score"
    larger: ClassVar[bool] = True
    several: ClassVar[bool] = True

    task: tuple[Task, ...] = Field((), description="a task: NAME=OBJECTIVE[,OPTION=VALUE…]; may be repeated")
    temperature: float = Field(1.0, gt=0, description="of sampling: 1 in proportion to size, more for alike")
    limit: int | None = Field(None, gt=0, description="most examples that a data set counts for")
    uncertainty: bool = Field(False, description="learn the weight of each task's loss")
    uncertainty_rate: float = Field(10.0, gt=0, description="learning rate of the weights over the program's")

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
            raise ValueError(f"two tasks are called {next(n for n in names if names.count(n) > 1)!r}")
        return self

    @cached_property
    def tasks(self) -> dict[str, Objective]:
        """The objective of each task. Raises TrainingError for one that is wrong."""
        return {t.name: t.made(f"task {t.name!r}", output=f"logits_{t.name}") for t in self.task}

    # -- data

    def prepared(self, rows: Any, setting: Setting) -> Setting:
        there = names_in(rows)
        if not there:
            raise TrainingError(
                f"objective {self.name!r} reads data of each task: give --data NAME=FILE for {', '.join(self.tasks)}"
            )
        for name in self.tasks:
            if name not in there:
                raise TrainingError(
                    f"task {name!r} has no data; give --data {name}=FILE (there is {', '.join(there)})"
                )
        for name in there:
            if name not in self.tasks:
                hint = nearest(name, self.tasks) or f"; there are {', '.join(self.tasks)}"
                raise TrainingError(f"there is no task {name!r} for the data of that name{hint}")
        decided = {}
        for name, objective in self.tasks.items():
            self._check_head(name, objective, setting)
            try:
                own = objective.prepared(part_of(rows, name), setting)
            except SurgeryError as error:
                raise type(error)(f"task {name!r}: {error}") from None
            decided[name] = {"columns": dict(own.columns), "decided": dict(own.decided)}
        return replace(setting, decided=decided)

    def _check_head(self, name: str, objective: Objective, setting: Setting) -> None:
        output = getattr(objective, "output", None)
        if output is not None and output not in setting.widths:
            raise TrainingError(
                f"task {name!r}: the model has no output {output!r}; it gives {', '.join(setting.widths)}; put one on "
                f"with --pass head --mode add --head-name {name}, or name another with output=…"
            )

    def _own(self, setting: Setting, name: str) -> Setting:
        """The setting of one task."""
        return replace(setting, **setting.decided[name])

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        name, own = row_of(row)
        objective = self.tasks[name]
        try:
            made = list(objective.examples(own, self._own(setting, name)))
        except SurgeryError as error:
            raise type(error)(f"task {name!r}: {error}") from None
        # Examples of tasks differ in their fields, and a table has columns of one kind.
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
        """How many batches of an epoch each task has, at least one."""
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
                f"a batch is of one task, and this has {', '.join(sorted(names))}; see `epoch`"
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
        # Without a gradient nothing of the program learns, and what is learned beside it must not hide that.
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
    """A task's part of a recipe, with its name. Raises ValueError."""
    if not isinstance(said, dict) or not isinstance(said.get("objective"), str):
        raise ValueError(
            f"task {name!r} is an objective's name, or a mapping with `objective` and its options"
        )
    return {**said, "name": name}


class TaskNoise(Learned):
    """s, the logarithm of the variance of each task's noise."""

    def __init__(self, names: Iterable[str], rate: float = 1.0) -> None:
        super().__init__()
        self.rate = rate
        self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    def forward(self, name: str, loss: Tensor) -> Tensor:
        """The loss of a task as it counts."""
        s = self.log_variance[name]
        return torch.exp(-s) * loss + s / 2

    def weight(self, name: str) -> Tensor:
        """What the loss of a task is multiplied with."""
        return torch.exp(-self.log_variance[name])
