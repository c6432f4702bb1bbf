"""Evaluations in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from surgery.cli.inference.evaluate import Evaluation, guess_objective
from surgery.cli.inference.figures import ClassReport
from surgery.cli.inference.runner import Runner
from surgery.cli.render import console
from surgery.common.errors import SurgeryError
from surgery.common.plugins import Plugins
from surgery.train.data import Rows, read_test_rows
from surgery.train.objective import Objective
from surgery.train.registry import find_objective
from surgery.train.tables import joined

_MOST_CLASSES = 20  # of a confusion matrix that the terminal shows


def asked_objective(
    groups: Sequence[tuple[str, dict[str, Any]]], plugins: Plugins, columns: Mapping[str, str]
) -> Objective | None:
    """The objective of --objective with its options, or None.

    Args:
        groups: name and options of each --objective.
        plugins: plugins with the objectives.
        columns: columns that were named before --objective, by option.

    Raises:
        SurgeryError: there are several, or its name or an option is wrong.
    """
    if len(groups) > 1:
        raise SurgeryError("give one --objective NAME; `surgery objectives` lists them")
    return find_objective(plugins, groups[0][0]).cls.parse({**columns, **groups[0][1]}) if groups else None


def guessed_objective(runner: Runner, rows: Any, plugins: Plugins, columns: Mapping[str, str]) -> Objective:
    """The objective that the outputs and the data decide, with the columns that were named; a note names it."""
    objective = guess_objective(runner, rows, plugins, columns)
    click.echo(f"note: evaluates as {objective.name}; --objective NAME chooses another", err=True)
    return objective


def read_rows_of(data: Sequence[str], objective: Objective | None) -> Any:
    """The rows of --data: of one data set, or NAME=FILE for an objective with several.

    Raises:
        SurgeryError: the data cannot be read, or has no names where the objective needs them.
    """
    if objective is None or not objective.several:
        return read_test_rows([Path(text) for text in data])
    files: dict[str, list[Path]] = {}
    for text in data:
        name, equals, path = text.partition("=")
        if not equals:
            raise SurgeryError(
                f"--data {text}: objective {objective.name!r} reads several data sets; write NAME={text}"
            )
        files.setdefault(name, []).append(Path(path))
    return joined({name: Rows(read_test_rows(paths)) for name, paths in files.items()}).train


def tell_evaluation(found: Evaluation, model: str, as_json: bool) -> str:
    """Print an evaluation.

    Returns:
        The report as JSON, for a file.
    """
    report = json.dumps({"model": model, **found.to_json()}, indent=1)
    if as_json:
        click.echo(report)
        return report
    out = console()
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
    examples = f", {found.examples:,} examples" if found.examples != found.rows else ""
    out.print(f"{found.objective} on {found.rows:,} rows{examples}: {figures}")
    if found.classes is not None:
        _classes(out, found.classes)
    return report


def _classes(out: Console, report: ClassReport) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("class", overflow="fold")
    for title in ("precision", "recall", "f1", "rows"):
        table.add_column(title, justify="right")
    for each in report.classes:
        numbers = (f"{each.precision:.4f}", f"{each.recall:.4f}", f"{each.f1:.4f}", f"{each.support:,}")
        table.add_row(each.name, *numbers)
    out.print(table)
    if len(report.classes) > _MOST_CLASSES:
        out.print(f"confusion matrix of {len(report.classes)} classes: --json prints it")
        return
    out.print("confusion matrix: rows are the actual classes, columns the predicted ones")
    matrix = Table(box=None, header_style="bold", padding=(0, 1))
    matrix.add_column("")
    for each in report.classes:
        matrix.add_column(each.name, justify="right", overflow="ellipsis")
    for each, row in zip(report.classes, report.confusion, strict=True):
        matrix.add_row(each.name, *map(str, row))
    out.print(matrix)
