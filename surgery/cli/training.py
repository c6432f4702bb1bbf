"""Training on the command line: the run directory, progress in the terminal, and the saved result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from surgery.cli.render import console, trainable_line
from surgery.common.errors import SurgeryError
from surgery.engine.program import Program
from surgery.train.checkpoint import Checkpoints
from surgery.train.data import Rows
from surgery.train.loop import Loop, Result
from surgery.train.request import TrainingRequest
from surgery.train.tokenizers import find_tokenizer
from surgery.train.watchers import TensorBoard, Watcher


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
    if Checkpoints(run).steps() and not resume:
        if not overwrite:
            raise SurgeryError(
                f"{run} holds an interrupted run; use --resume to continue it, or --overwrite to start again"
            )
        if _is_main():
            Checkpoints(run).clear()
    return run


def train_program(
    program: Program,
    request: TrainingRequest,
    rows: Rows,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    tensorboard: bool,
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
        tensorboard: write TensorBoard event files too.
        quiet: print nothing.

    Returns:
        Figures of the training in the main process, None in other processes of a distributed run.
    """
    out, run = console(), run_directory_of(output)
    watchers: list[Watcher] = [] if quiet or not _is_main() else [_Live(out, request.objective.metric)]
    if tensorboard and _is_main():
        watchers.append(TensorBoard(run / "tensorboard"))
    tokenizer = find_tokenizer(program, request.tokenizer)
    loop = Loop(program, request.objective, rows, request.settings, run, tokenizer, watchers)
    if _is_main() and not quiet:
        out.print(f"{trainable_line(program)}; {len(loop.data):,} examples, {loop.steps:,} steps")
    result = loop.run(resume)
    if not _is_main():
        return None
    program.save(output, overwrite=overwrite)
    Checkpoints(run).clear()
    if not quiet:
        _tell(out, result, output, run)
    return result


def _is_main() -> bool:
    """True in the main process of torchrun or accelerate launch, and without them."""
    return os.environ.get("RANK", "0") == "0"


def _tell(out: Console, result: Result, output: Path, run: Path) -> None:
    if result.metrics:
        moved = ", ".join(
            f"{name} {result.before[name]:.4g} → {value:.4g}" for name, value in result.metrics.items()
        )
        out.print(f"held out: {moved}")
    early = ", stopped early" if result.stopped else ""
    which = (
        f"the best of {result.steps} steps is {result.best}" if result.metrics else f"{result.steps} steps"
    )
    out.print(f"{which}{early}; wrote {output} (log: {run / 'log.jsonl'})")


class _Live(Watcher):
    """Progress bar with loss, tokens per second and time left, and a line for each evaluation and note."""

    def __init__(self, out: Console, metric: str) -> None:
        self.out, self.metric = out, metric
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("{task.fields[score]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=out,
        )
        self.loss, self.tokens, self.time, self.score = float("nan"), 0.0, perf_counter(), ""

    def begun(self, step: int, steps: int) -> None:
        if step:
            self.out.print(f"continuing from the checkpoint of step {step}")
        self.task = self.progress.add_task(
            "", total=steps, completed=step, loss=float("nan"), speed=0.0, score=""
        )
        self.progress.start()

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        now = perf_counter()
        speed, self.time = tokens / max(now - self.time, 1e-9), now
        # Exponential averages: single steps vary too much to read. The first loss starts the average.
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        self.tokens = speed if not self.tokens else 0.9 * self.tokens + 0.1 * speed
        self.progress.update(self.task, completed=step, loss=self.loss, speed=self.tokens, score=self.score)

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
