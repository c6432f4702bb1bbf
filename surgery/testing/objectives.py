"""The conformance kit of objectives: `check_objective`."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from surgery.engine.program import Program
from surgery.testing.case import ConformanceError, Skip
from surgery.testing.report import ConformanceReport
from surgery.testing.steps import run_steps
from surgery.testing.training import slope
from surgery.train.data import Rows, make_examples, read_rows
from surgery.train.data_context import Setting
from surgery.train.loop import train
from surgery.train.objective import Batch, Objective, OnPolicy
from surgery.train.options import Settings
from surgery.train.tokenizers import find_tokenizer

# A central difference in fp32 of a loss of about 1 is exact to a few percent.
_SLOPE = 0.05
_STEPS = (1e-2, 3e-3, 1e-3, 3e-4)
# A mean over rows is summed in another order than the rows alone.
_SUM = 1e-4


def check_objective(
    objective: Objective,
    program: Program,
    data: Path | str | Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    rows_apart: bool = True,
    raises: bool = True,
) -> ConformanceReport:
    """Run the checks of an objective on one program and a few rows of data.

    options      the options survive a recipe: parse(options()) is equal
    data         the rows give examples, and a batch has `inputs`
    loss         the loss is a finite scalar, and the same for the same random generator
    gradient     its gradient is that of central differences, and reaches what trains
    rows         the loss of a batch is the mean of its rows' losses, weighted by `terms`: padding counts nothing
    metrics      `metrics` of what `observe` returns has the objective's `metric`, which is finite
    learns       twenty steps on one batch lower the loss
    loop         the training loop runs, evaluates and ends with a finite metric

    Args:
        objective: The objective, with options.
        program: A program with trainable parameters; it is not changed.
        data: A file or directory that `surgery train --data` reads, or rows as dicts. Eight rows are enough.
        tokenizer: The tokenizer; by default that of the program.
        rows_apart: False for an objective that compares rows with each other, such as a contrastive one; `rows` is
            then skipped.
        raises: False collects failures in the report instead of raising at the first one.

    Raises:
        ConformanceError: A check fails.
        ValueError: The objective makes its own data (a subclass of OnPolicy).
    """
    if isinstance(objective, OnPolicy):
        raise ValueError(
            f"{objective.name} draws its own data, so it has no batches to check; test its loop instead"
        )
    case = _Case(objective, program, data, tokenizer)
    steps = {
        "options": case.options,
        "data": case.examples_exist,
        "loss": case.loss,
        "gradient": case.gradient,
        "rows": case.rows_apart if rows_apart else _compares,
        "metrics": case.metrics,
        "learns": case.learns,
        "loop": case.loop,
    }
    return run_steps(objective.name, steps, raises)


def _compares() -> str:
    raise Skip("rows are compared with each other")


class _Case:
    """An objective on a copy of a program."""

    def __init__(self, objective: Objective, program: Program, data: Any, tokenizer: Any) -> None:
        self.objective = objective
        self.program = copy.deepcopy(program)
        self.tokenizer = tokenizer if tokenizer is not None else find_tokenizer(program)
        self.data = data

    def error(self, check: str, message: str) -> ConformanceError:
        return ConformanceError(self.objective.name, check, message)

    @cached_property
    def rows(self) -> Rows:
        if isinstance(self.data, (str, Path)):
            return read_rows([Path(self.data)])
        from datasets import Dataset

        return Rows(Dataset.from_list([dict(row) for row in self.data]))

    @cached_property
    def setting(self) -> Setting:
        return self.objective.prepared(self.rows.train, Setting.of(self.program, self.tokenizer, 64))

    @cached_property
    def examples(self) -> list[Any]:
        found = make_examples(self.rows.train, self.objective, self.setting)
        return found[range(min(len(found), 8))]

    @cached_property
    def module(self) -> nn.Module:
        return self.program.module().eval()

    @cached_property
    def companions(self) -> Mapping[str, nn.Module]:
        return self.objective.companions(self.program)

    def batch(self, examples: Sequence[Any]) -> Batch:
        batch = self.objective.collate(examples, self.setting, Generator().manual_seed(0))
        with torch.no_grad():
            return self.objective.complete(batch, self.companions)

    def loss_of(self, batch: Batch) -> Tensor:
        return self.objective.loss(self.module, batch)

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def options(self) -> str:
        again = type(self.objective).parse(self.objective.options())
        if again != self.objective:
            raise self.error("options", f"parse(options()) gives {again!r}; make every option a field")
        return f"{len(self.objective.options())} options"

    def examples_exist(self) -> str:
        if not self.examples:
            raise self.error("data", "the rows give no example")
        batch = self.batch(self.examples)
        if "inputs" not in batch:
            raise self.error("data", f"the batch has {', '.join(batch)}, and no `inputs` for the module")
        return f"{len(self.examples)} examples"

    def loss(self) -> str:
        first, second = (self.loss_of(self.batch(self.examples)).detach() for _ in range(2))
        if first.dim() or not first.isfinite():
            raise self.error("loss", f"it is {first!r}; return a finite scalar")
        if not torch.equal(first, second):
            raise self.error("loss", "two batches of one random generator differ; draw from `draw` alone")
        return f"{float(first):.4g}"

    def gradient(self) -> str:
        trained = self.trained
        batch = self.batch(self.examples)
        got = dict(
            zip(
                trained,
                torch.autograd.grad(self.loss_of(batch), list(trained.values()), allow_unused=True),
                strict=True,
            )
        )
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in got.values() if g is not None))
        if not norm or not math.isfinite(norm):
            raise self.error("gradient", f"its norm over all that trains is {norm}")
        along = {name: torch.zeros_like(trained[name]) if g is None else g / norm for name, g in got.items()}
        slopes = [slope(lambda: self.loss_of(batch), trained, along, step) / norm for step in _STEPS]
        error = min(abs(each - 1) for each in slopes)
        if error > _SLOPE:
            raise self.error(
                "gradient", f"it differs from central differences by {error:.1%}: something is detached"
            )
        reached = sum(g is not None and bool(g.any()) for g in got.values())
        return f"within {error:.1e}; reaches {reached} of {len(got)} parameters"

    def rows_apart(self) -> str:
        objective, examples = self.objective, self.examples[:4]
        if len(examples) < 2:
            raise Skip("fewer than two examples")
        batches = [self.batch([example]) for example in examples]
        weights = [objective.terms(batch) for batch in batches]
        alone = sum(float(self.loss_of(b).detach()) * w for b, w in zip(batches, weights, strict=True)) / sum(
            weights
        )
        together = float(self.loss_of(self.batch(examples)).detach())
        gap = abs(together - alone) / max(abs(alone), 1e-6)
        if gap > _SUM:
            raise self.error(
                "rows",
                f"the loss of {len(examples)} rows is {together:.6g}, and the mean of their own losses by `terms` is "
                f"{alone:.6g}: padding counts, `terms` is wrong, or rows are compared (rows_apart=False)",
            )
        return f"within {gap:.1e}"

    def metrics(self) -> str:
        objective = self.objective
        with torch.no_grad():
            found = objective.metrics(objective.observe(self.module, self.batch(self.examples)))
        if objective.metric not in found or not math.isfinite(found[objective.metric]):
            raise self.error(
                "metrics", f"{objective.metric!r} selects the best checkpoint, and they are {found}"
            )
        return ", ".join(f"{name} {value:.4g}" for name, value in found.items())

    def learns(self) -> str:
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        batch = self.batch(self.examples)
        before = float(self.loss_of(batch).detach())
        optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-2, weight_decay=0.0)
        for _ in range(20):
            optimizer.zero_grad()
            self.loss_of(batch).backward()
            optimizer.step()
        after = float(self.loss_of(batch).detach())
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(kept[name])
        if not after < before:
            raise self.error("learns", f"twenty steps on one batch move it from {before:.4g} to {after:.4g}")
        return f"{before:.4g} to {after:.4g}"

    def loop(self) -> str:
        settings = Settings.parse({"steps": 2, "batch": min(4, len(self.examples)), "max_length": 64})
        rows = Rows(self.rows.train, self.rows.train)
        with tempfile.TemporaryDirectory(prefix="surgery-objective-") as folder:
            result = train(
                self.program, self.objective, rows, settings, folder=Path(folder), tokenizer=self.tokenizer
            )
        return str(result).splitlines()[0][:100]
