"""What an objective is: a frozen pydantic model whose fields are its options, and functions of a module and a batch.

setting = Setting.of(program, tokenizer)
setting = objective.prepared(rows, setting)
examples = [example for row in rows for example in objective.examples(row, setting)]
batch = objective.collate(examples[:8], setting, torch.Generator())
objective.loss(module, batch).backward()            # in any loop
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from surgery.common.errors import SurgeryError, TrainingError, nearest
from surgery.common.options import Configured
from surgery.train.data_context import Row, Setting

if TYPE_CHECKING:
    from surgery.engine.program import Program
    from surgery.train.examples import Examples

Batch = dict[str, Any]


class Objective(Configured):
    """Base of all objectives. A batch has the module's arguments under `inputs`; all else in it is the objective's.

    guesses: options that name a column -> names under which it is looked for where the option is not given. metric:
    of what `metrics` gives, that by which the best checkpoint is chosen; larger: whether more of it is better.
    several: whether its rows are those of several data sets, by name (see surgery.train.tables). aliases: other
    names that it is found by.
    """

    kind: ClassVar[str] = "objective"
    failure: ClassVar[type[SurgeryError]] = TrainingError
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    metric: ClassVar[str] = "loss"
    larger: ClassVar[bool] = False
    several: ClassVar[bool] = False
    aliases: ClassVar[tuple[str, ...]] = ()

    def columns(self, available: Sequence[str]) -> dict[str, str]:
        """The column for each option in `guesses`. Raises TrainingError where one is missing."""
        found = self.named_columns(available)
        for option in self.guesses:
            if option not in found:
                raise TrainingError(
                    f"objective {self.name!r}: no column looks like the {option}; the data has "
                    f"{', '.join(available)}; name one with --{option}"
                )
        return found

    def named_columns(self, available: Sequence[str]) -> dict[str, str]:
        """The columns that are there, given or guessed."""
        found: dict[str, str] = {}
        for option, names in self.guesses.items():
            given = getattr(self, option)
            if given is not None and given not in available:
                hint = nearest(given, available) or f"; it has {', '.join(available)}"
                raise TrainingError(f"objective {self.name!r}: the data has no column {given!r}{hint}")
            lowered = {name.lower(): name for name in reversed(available)}
            guess = next((lowered[name] for name in names if name in lowered), None)
            column = given or guess
            if column is not None:
                found[option] = column
        return found

    def prepared(self, rows: Any, setting: Setting) -> Setting:
        """The setting with the columns, and with what `decide` finds in the rows (a datasets.Dataset)."""
        setting = replace(setting, columns=self.columns(rows.column_names))
        return replace(setting, decided=self.decide(rows, setting))

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        """Everything that depends on the data as a whole, JSON-able: `setting.decided` from here on.

        Raises TrainingError for data or a program that do not suit, before anything is made of a row.
        """
        return {}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        """What is trained on of one row: none (after `setting.count(why)`), one or several; numbers and lists."""
        raise NotImplementedError

    def size(self, example: Row) -> int:
        """How long an example is: batches are of similar length, so that little is padding."""
        return len(example.get("input_ids", ()))

    def epoch(self, data: Examples, batch: int, draw: Generator | None) -> list[list[int]]:
        """The numbers of the examples of each batch: of an epoch, or (draw None) of all held-out, shortest first."""
        if draw is not None:
            return self.batches(data.sizes, batch, draw)
        order = sorted(range(len(data)), key=data.sizes.__getitem__)
        return [order[i : i + batch] for i in range(0, len(order), batch)]

    def batches(self, sizes: Sequence[int], batch: int, draw: Generator) -> list[list[int]]:
        """One epoch: the numbers of the examples of each batch. sizes: of all of them."""
        order = torch.randperm(len(sizes), generator=draw).tolist()
        chunk = batch * 16
        groups = [sorted(order[i : i + chunk], key=sizes.__getitem__) for i in range(0, len(order), chunk)]
        ready = [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]
        return [ready[i] for i in torch.randperm(len(ready), generator=draw).tolist()]

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        """A batch of examples. draw: whatever is random in it comes from here."""
        raise NotImplementedError

    def companions(self, program: Program) -> Mapping[str, nn.Module]:
        """Other modules that it reads beside the one that trains: a teacher, the program without its adapters; and what
        it learns itself (see surgery.train.learned)."""
        return {}

    def complete(self, batch: Batch, companions: Mapping[str, nn.Module]) -> Batch:
        """The batch with what companions say of it, and with what is learned; runs without gradients."""
        return batch

    def check(self, module: nn.Module, batch: Batch, form: str) -> None:
        """Look at what is to train, in eval mode with its first batch; form: "live" or "graph".

        Raises TrainingError where it cannot be trained in this way.
        """

    def unpacked(self, batch: Batch) -> Batch:
        """The batch as the program's graph takes it."""
        return batch

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The mean over `terms(batch)` terms, to be minimised."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> int:
        """How many terms the loss is the mean of: several batches of one step weigh by it."""
        raise NotImplementedError

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `metrics` needs of a held-out batch; joined over all batches along axis 0."""
        raise NotImplementedError

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures of the held-out data, `loss` and `metric` among them."""
        raise NotImplementedError


class OnPolicy(Objective):
    """Objectives that learn from what the program does: `complete` acts with it, and a step is `improve`, once.

    Both see the program in eval mode, because under dropout what acted and what learns would be two policies. Their
    metrics need no `loss`.
    """

    def improve(
        self, module: nn.Module, batch: Batch, optimizer: Optimizer, clip: float, kept: dict[str, float]
    ) -> dict[str, float]:
        """Change the weights after one batch; returns figures of it, `loss` among them.

        optimizer: of all that trains, at the step's learning rate. clip: largest norm of the gradient, or infinity.
        kept: numbers that go on from step to step, for the objective to change; empty at the first one.
        Raises SurgeryError for what is not finite.
        """
        raise NotImplementedError


def run(module: nn.Module, batch: Batch) -> Any:
    """What the module gives for a batch."""
    inputs = batch["inputs"]
    return module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)


def output(outputs: Any, name: str) -> Tensor:
    """One output by name; of a module that returns no names its first, or only, tensor."""
    if isinstance(outputs, Mapping):
        return outputs[name if name in outputs else next(iter(outputs))]
    return outputs if isinstance(outputs, Tensor) else outputs[0]
