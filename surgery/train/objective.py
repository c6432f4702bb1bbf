"""Base of objectives: a frozen pydantic model whose fields are the options, with functions of a module and a batch.

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
_SHOWN = 12  # classes that a note lists


class Objective(Configured):
    """Base class of all objectives.

    A batch is a dict. `inputs` are the module's arguments; all other keys belong to the objective.

    Attributes:
        guesses: for each option that names a column, the column names to try if the option is not given.
        metric: name of the metric that selects the best checkpoint.
        larger: True if a larger metric is better.
        several: True if the rows come from several named data sets (see surgery.train.tables).
        aliases: alternative names of the objective.
        pace: factor of the default learning rate.
        heads: names of transformers tasks whose heads the objective can train, by preference.
    """

    _kind: ClassVar[str] = "objective"
    _failure: ClassVar[type[SurgeryError]] = TrainingError
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    metric: ClassVar[str] = "loss"
    larger: ClassVar[bool] = False
    several: ClassVar[bool] = False
    aliases: ClassVar[tuple[str, ...]] = ()
    pace: ClassVar[float] = 1.0
    heads: ClassVar[tuple[str, ...]] = ()

    def columns(self, available: Sequence[str]) -> dict[str, str]:
        """Return the data column of each option in `guesses`.

        Raises:
            TrainingError: no column fits an option.
        """
        found = self.named_columns(available)
        for option in self.guesses:
            if option not in found:
                raise TrainingError(
                    f"objective {self.name!r}: no column looks like the {option}; the data has "
                    f"{', '.join(available)}; name one with --{option}"
                )
        return found

    def named_columns(self, available: Sequence[str]) -> dict[str, str]:
        """Return the columns that were given or can be guessed. Options without a column are left out.

        Raises:
            TrainingError: a given column is not in the data.
        """
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
        """Return the setting with the columns and the decisions for these rows.

        Args:
            rows: all rows (a datasets.Dataset).
            setting: data context of the program.
        """
        setting = replace(setting, columns=self.columns(rows.column_names))
        return replace(setting, decided=self.decide(rows, setting))

    def outputs_for(self, rows: Any) -> int | None:
        """Return the number of outputs that a new head needs for these rows, or None if its model decides."""
        return None

    def labels(self, setting: Setting) -> dict[str, tuple[str, ...]]:
        """Return the names of classes that the objective gives to outputs of the program, by output."""
        return {}

    def notes(self, setting: Setting) -> list[str]:
        """Return sentences about what was guessed about the data, such as columns."""
        guessed = [
            f"the {'image' if option == 'text' and setting.images is not None else option} from column {column!r}"
            for option, column in setting.columns.items()
            if getattr(self, option) is None
        ]
        named = [
            f"{output}: "
            + ", ".join(f"{number} = {name}" for number, name in enumerate(names[:_SHOWN]))
            + (f", … ({len(names)} classes)" if len(names) > _SHOWN else "")
            for output, names in self.labels(setting).items()
        ]
        return ([f"reads {' and '.join(guessed)}"] if guessed else []) + [
            f"classes of {text}" for text in named
        ]

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        """Decide everything that depends on the data as a whole, such as the list of labels.

        Returns:
            JSON-compatible values, kept as `setting.decided`.

        Raises:
            TrainingError: the data or the program does not fit the objective.
        """
        return {}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        """Make the examples of one row, as numbers and lists.

        A row may give none (after `setting.count(reason)`), one or several.
        """
        raise NotImplementedError

    def size(self, example: Row) -> int:
        """Return the length of an example. Batches group similar lengths to save padding."""
        return len(example.get("input_ids", ()))

    def epoch(self, data: Examples, batch: int, draw: Generator | None) -> list[list[int]]:
        """Return the example indices of each batch of an epoch.

        Args:
            data: all examples.
            batch: examples per batch.
            draw: random generator, or None for held-out data, which is sorted by length.
        """
        if draw is not None:
            return self.batches(data.sizes, batch, draw)
        order = sorted(range(len(data)), key=data.sizes.__getitem__)
        return [order[i : i + batch] for i in range(0, len(order), batch)]

    def batches(self, sizes: Sequence[int], batch: int, draw: Generator) -> list[list[int]]:
        """Draw the example indices of each batch of one epoch.

        Args:
            sizes: length of every example.
            batch: examples per batch.
            draw: random generator.
        """
        order = torch.randperm(len(sizes), generator=draw).tolist()
        # Sort by length only within random chunks of 16 batches: little padding, and batches still differ
        # between epochs.
        chunk = batch * 16
        groups = [sorted(order[i : i + chunk], key=sizes.__getitem__) for i in range(0, len(order), chunk)]
        ready = [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]
        return [ready[i] for i in torch.randperm(len(ready), generator=draw).tolist()]

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        """Make a batch of examples.

        Args:
            examples: examples of the batch.
            setting: data context.
            draw: random generator for everything random in the batch.
        """
        raise NotImplementedError

    def companions(self, program: Program) -> Mapping[str, nn.Module]:
        """Return other modules the objective needs, by name.

        Examples are a teacher, a reference policy, and tensors the objective learns (see surgery.train.learned).
        """
        return {}

    def complete(self, batch: Batch, companions: Mapping[str, nn.Module]) -> Batch:
        """Add the companions' outputs, and the learned tensors, to the batch. Runs without gradients."""
        return batch

    def check(self, module: nn.Module, batch: Batch, form: str) -> None:
        """Check the module with its first batch, in eval mode.

        Args:
            module: module to train.
            batch: first batch.
            form: "live" or "graph".

        Raises:
            TrainingError: the module cannot be trained in this form.
        """

    def unpacked(self, batch: Batch) -> Batch:
        """Return the batch in the form that the program's graph accepts."""
        return batch

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the loss to minimize, a mean over `terms(batch)` terms."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> int:
        """Return the number of terms in the mean of the loss. Gradient accumulation weights batches by it."""
        raise NotImplementedError

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the tensors of a held-out batch that `metrics` needs. They are concatenated over batches on axis 0."""
        raise NotImplementedError

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the metrics of the held-out data. They must include `loss` and `metric`."""
        raise NotImplementedError


class OnPolicy(Objective):
    """Base class of objectives that learn from the program's own actions.

    `complete` acts with the program (for example samples responses), and `improve` does the whole step. Both run in
    eval mode: with dropout, the policy that acts and the policy that learns would differ. The metrics need no `loss`.
    """

    pace: ClassVar[float] = 0.1

    def improve(
        self, module: nn.Module, batch: Batch, optimizer: Optimizer, clip: float, kept: dict[str, float]
    ) -> dict[str, float]:
        """Update the weights from one batch.

        Args:
            module: module to train.
            batch: completed batch.
            optimizer: optimizer of all trained parameters, at the learning rate of the step.
            clip: maximum norm of the gradient, or infinity.
            kept: numbers to carry from step to step. The objective changes them in place; empty at the first step.

        Returns:
            Figures to log, including `loss`.

        Raises:
            SurgeryError: a value is not finite.
        """
        raise NotImplementedError


def run(module: nn.Module, batch: Batch) -> Any:
    """Call the module with the inputs of a batch."""
    inputs = batch["inputs"]
    return module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)


def output(outputs: Any, name: str) -> Tensor:
    """Select an output by name. If there is no such name, or no names at all, take the first output."""
    if isinstance(outputs, Mapping):
        return outputs[name if name in outputs else next(iter(outputs))]
    return outputs if isinstance(outputs, Tensor) else outputs[0]
