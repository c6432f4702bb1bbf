"""Training on the command line: the run directory, progress in the terminal, and the saved result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from surgery.cli.loading import Choose
from surgery.cli.options import DEVICE
from surgery.cli.render import console, trainable_line
from surgery.common.errors import SurgeryError
from surgery.common.progress import is_quiet
from surgery.engine.program import Program
from surgery.train.checkpoint import Checkpoints
from surgery.train.data import Rows
from surgery.train.head_choice import choose_head
from surgery.train.loop import Loop, Result
from surgery.train.request import TrainingRequest
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tracking import Tracked
from surgery.train.watchers import Watcher


def run_directory_of(output: Path) -> Path:
    """Directory of the checkpoints and the log of a training that writes to `output`."""
    return output.with_name(output.name + ".run")


def prepare_run(output: Path, resume: bool, overwrite: bool) -> Path:
    """Make the run directory ready for a training to `output`, and return it.

    Args:
        output: directory that the trained program will be written to.
        resume: continue from checkpoints of an interrupted run.
        overwrite: delete such checkpoints.

    Raises:
        SurgeryError: there are checkpoints, and neither `resume` nor `overwrite` is given.
    """
    run = run_directory_of(output)
    if not resume:
        if Checkpoints(run).begun and not overwrite:
            raise SurgeryError(
                f"{run} holds an interrupted run; use --resume to continue it, or --overwrite to start again"
            )
        if _is_main():
            Checkpoints(run).clear()
    return run


def head_for(request: TrainingRequest, rows: Rows) -> Choose:
    """A function for the loader of a model that gives it the head that a training needs, and says so on stderr."""

    def choose(ref: str, task: str | None, model_kwargs: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        found = choose_head(request.objective, rows, ref, task, model_kwargs)
        if found.note:
            click.echo(f"note: {found.note}", err=True)
        return found.task, dict(found.model_kwargs)

    return choose


def train_program(
    program: Program,
    request: TrainingRequest,
    rows: Rows,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    track: Sequence[str],
    quiet: bool,
) -> Result | None:
    """Train a program in place, save it, and print the result.

    Args:
        program: program to train.
        request: objective, data and settings.
        rows: data of `request`, read before.
        output: directory to write the trained program to.
        resume: continue from the last checkpoint.
        overwrite: replace what `output` holds.
        track: names of experiment trackers that get the figures too.
        quiet: print nothing.

    Returns:
        Figures of the training in the main process, None in other processes of a distributed run.
    """
    out, run = console(), run_directory_of(output)
    live = _Live(out, request.objective.metric)
    watchers: list[Watcher] = [] if quiet or is_quiet() or not _is_main() else [live]
    if _is_main():
        watchers += [
            Tracked(name, run / name, output.name, facts_of(request)) for name in dict.fromkeys(track)
        ]
    tokenizer = find_tokenizer(program, request.tokenizer)
    device = click.get_current_context().meta.get(DEVICE)
    loop = Loop(program, request.objective, rows, request.settings, run, tokenizer, watchers, device)
    live.unit = "images" if loop.setting.images else "tokens" if loop.setting.tokenizer else "rows"
    if _is_main() and not quiet:
        size = f"{len(loop.data):,} examples, {loop.steps:,} steps, learning rate {loop.lr:g}"
        out.print(f"{trainable_line(loop.program)}; {size}")
    result = loop.run(resume)
    if not _is_main():
        return None
    program.save(output, overwrite=overwrite)
    Checkpoints(run).clear()
    if not quiet:
        _tell(out, result, output, run, request.objective.metric)
    return result


def facts_of(request: TrainingRequest) -> dict[str, Any]:
    """The options of a training, flat, for experiment trackers."""
    written = request.written()
    objective = written.pop("objective")
    return {
        "objective": objective["name"],
        **{f"objective/{name}": value for name, value in objective.items() if name != "name"},
        **written,
    }


def _is_main() -> bool:
    """True in the main process of torchrun or accelerate launch, and without them."""
    return os.environ.get("RANK", "0") == "0"


def _tell(out: Console, result: Result, output: Path, run: Path, metric: str) -> None:
    early = ", stopped early" if result.stopped else ""
    where = f"wrote {output} (log: {run / 'log.jsonl'})"
    if not result.metrics:
        out.print(f"{result.steps} steps{early}; {where}")
        return
    if result.tried:
        out.print(
            f"held out: no step reached the start's {metric} of {result.before[metric]:.4g} (the best: "
            f"{result.tried[metric]:.4g}), so the weights from before the training are kept; try another --lr",
            style="yellow",
        )
        out.print(f"{result.steps} steps{early}; {where}")
        return
    moved = ", ".join(
        f"{name} {result.before[name]:.4g} → {value:.4g}" for name, value in result.metrics.items()
    )
    out.print(f"held out: {moved}")
    out.print(f"the best of {result.steps} steps is {result.best}{early}; {where}")


class _Live(Watcher):
    """Progress bar with loss, speed and time left, and a line for each evaluation and note.

    Attributes:
        unit: what the speed counts: tokens, images or rows.
    """

    def __init__(self, out: Console, metric: str) -> None:
        self.out, self.metric = out, metric
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps{task.fields[said]}"),
            TextColumn("{task.fields[score]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=out,
            disable=not out.is_terminal,  # in a pipe rich would print the last state of the bar
        )
        self.loss, self.tokens, self.time, self.score = float("nan"), 0.0, perf_counter(), ""
        self.unit = "tokens"

    def begun(self, step: int, steps: int) -> None:
        if step:
            self.out.print(f"continuing from the checkpoint of step {step}")
        self.task = self.progress.add_task("", total=steps, completed=step, said="", score="")
        self.progress.start()

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        now = perf_counter()
        speed, self.time = tokens / max(now - self.time, 1e-9), now
        # Exponential averages: single steps vary too much to read. The first loss starts the average.
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        self.tokens = speed if not self.tokens else 0.9 * self.tokens + 0.1 * speed
        said = f", loss {self.loss:.4f}, {self.tokens:,.0f} {self.unit}/s"
        self.progress.update(self.task, completed=step, said=said, score=self.score)

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        if self.metric in figures:
            self.score = f"{self.metric} {figures[self.metric]:.4g}"
            self.progress.update(self.task, score=self.score)

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.progress.print(Text(f"step {step}: {shown}{' (best)' if best else ''}"))
        # The clock starts again, so that the time of an evaluation does not lower the speed.
        self.score, self.time = f"{self.metric} {metrics[self.metric]:.4g}", perf_counter()
        self.progress.update(self.task, score=self.score)

    def noted(self, step: int, sentence: str) -> None:
        self.progress.print(Text(f"step {step}: {sentence}", style="yellow"))

    def ended(self) -> None:
        self.progress.stop()
