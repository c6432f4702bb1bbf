"""Held-out figures of a finished model, by the objective that it was trained with or another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from surgery.capture.sentence.modules import EMBEDDING
from surgery.cli.inference.figures import ClassReport, regression_figures
from surgery.cli.inference.runner import Runner
from surgery.common.errors import TrainingError
from surgery.common.plugins import Plugins
from surgery.train.batch_order import number_for
from surgery.train.data import make_examples, quiet
from surgery.train.evaluation import observe
from surgery.train.objective import Objective
from surgery.train.objectives import Classification, Regression
from surgery.train.registry import find_objective
from surgery.train.summary import counted


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        objective: name of the objective.
        metric: the metric that selects the best model.
        larger: True if a larger one is better.
        metrics: the figures.
        rows: number of rows.
        examples: number of examples that were made of them.
        classes: figures of the classes of a classification, or None.
        notes: sentences about the data.
    """

    objective: str
    metric: str
    larger: bool
    metrics: Mapping[str, float]
    rows: int
    examples: int
    classes: ClassReport | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def quality(self) -> float:
        """The value of `metric`."""
        return self.metrics[self.metric]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-compatible values."""
        more = self.classes.to_json() if self.classes is not None else {}
        return {
            "objective": self.objective,
            "rows": self.rows,
            "examples": self.examples,
            "metrics": dict(self.metrics),
            **more,
            "notes": list(self.notes),
        }


def guess_objective(runner: Runner, rows: Any, plugins: Plugins, columns: Mapping[str, str]) -> Objective:
    """The objective that a model's outputs and the data suggest.

    Args:
        runner: the model.
        rows: the rows (a datasets.Dataset).
        plugins: plugins with the objectives.
        columns: columns of the data that were named, by option: `{"text": "Sentence"}`.

    Raises:
        TrainingError: none does, or the data has no such column.
    """
    return find_objective(plugins, _guess(runner, rows, columns)).cls.parse(dict(columns))


def _guess(runner: Runner, rows: Any, columns: Mapping[str, str]) -> str:
    ranks, widths = runner.ranks, runner.setting.widths
    if EMBEDDING in ranks:
        return "contrastive"
    output = "logits" if "logits" in ranks else next(iter(ranks)) if len(ranks) == 1 else None
    if output is None or ranks[output] not in (2, 3):
        raise TrainingError(
            f"the outputs of {runner.ref} ({', '.join(ranks)}) suggest no objective; name one with --objective, such "
            "as contrastive"
        )
    if ranks[output] == 3:
        architectures = str(getattr(runner.config, "architectures", None) or type(runner.module).__name__)
        if "MaskedLM" in architectures:
            return "masked-lm"
        if runner.setting.labels.get(output) or "TokenClassification" in architectures:
            raise TrainingError(
                f"{runner.ref} classifies tokens, for which there is no objective; name another one "
                "with --objective"
            )
        return "causal-lm"
    if widths.get(output) == 1 or getattr(runner.config, "problem_type", None) == "regression":
        return "regression"
    column = Regression.parse(dict(columns)).named_columns(rows.column_names).get("label")
    first = rows[0][column] if column is not None else None
    return "regression" if isinstance(first, list) else "classification"


def evaluate(
    runner: Runner, objective: Objective, rows: Any, *, batch: int = 16, seed: int = 0
) -> Evaluation:
    """Compute an objective's held-out figures on rows, as `surgery train` does.

    Args:
        runner: the model.
        objective: the objective.
        rows: the rows (a datasets.Dataset).
        batch: examples per batch.
        seed: seed of what the objective draws, as in training.

    Raises:
        TrainingError: the rows do not fit the objective or the model, or name classes that the model does not name.
    """
    with quiet():
        setting = objective.prepared(rows, runner.setting)
    _check_labels(runner, objective, setting)
    data = make_examples(rows, objective, setting)
    companions = _companions(runner, objective, seed)
    try:
        observed = observe(
            objective, runner.module, data, setting, batch=batch, seed=seed, companions=companions
        )
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise TrainingError(
            f"{runner.ref} cannot be judged as {objective.name}: {reason}; name another --objective, or a smaller "
            "--max-length"
        ) from error
    metrics = objective.metrics(observed)
    classes = None
    if isinstance(objective, Classification):
        output = setting.output_of(objective.output, objective.name)
        names = setting.decided.get("labels") or setting.labels.get(output, ())
        classes = ClassReport.of(observed["logits"], observed["labels"], names)
    elif isinstance(objective, Regression):
        metrics = {**metrics, **regression_figures(observed["said"], observed["labels"])}
    return Evaluation(
        objective.name,
        objective.metric,
        objective.larger,
        metrics,
        len(rows),
        len(data),
        classes,
        (*objective.notes(replace(setting, labels={})), *counted(setting, "")),
    )


def _check_labels(runner: Runner, objective: Objective, setting: Any) -> None:
    """Raise TrainingError if the objective had to number the names of the data itself, which would be a guess."""
    for output, names in objective.labels(setting).items():
        known = runner.setting.labels.get(output)
        if known == tuple(names):
            continue
        if known:
            raise TrainingError(
                f"the classes of {output!r} of {runner.ref} are {', '.join(known)}, and the data has "
                f"{', '.join(names)}; rename them, or name the model's classes in their order with --labels"
            )
        raise TrainingError(
            f"{runner.ref} does not name its classes, and the data has {', '.join(names)}; name the model's classes in "
            "their order with --labels"
        )


class _NoProgram:
    """Stands for the program in the companions of an objective. An objective that reads it gets an error."""

    def __init__(self, ref: str, objective: str) -> None:
        self.__dict__["said"] = (
            f"objective {objective!r} also needs the program that surgery saved (its base, or what it learns); {ref} "
            "is none"
        )

    def __getattr__(self, name: str) -> Any:
        raise TrainingError(self.__dict__["said"])


def _companions(runner: Runner, objective: Objective, seed: int) -> Mapping[str, nn.Module]:
    """The other modules of an objective. Those of most objectives need no program."""
    program: Any = runner.program or _NoProgram(runner.ref, objective.name)
    with torch.random.fork_rng():
        torch.manual_seed(number_for(seed, "companions"))
        return objective.companions(program)
