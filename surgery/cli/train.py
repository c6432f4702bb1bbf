"""Commands of training: train, objectives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, get_args

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from surgery.cli.options import json_option, model_options, output_option, overwrite_option
from surgery.cli.pass_groups import GroupCommand
from surgery.cli.reference import objective_pages, write_pages
from surgery.cli.render import console, trainable_line
from surgery.cli.see import list_registered, show_registered, write_option
from surgery.common.errors import SurgeryError, TrainingError
from surgery.common.files import refuse_taken
from surgery.common.options import Configured, describe_options
from surgery.common.plugins import Plugins
from surgery.engine.program import Program
from surgery.train import registry
from surgery.train.checkpoint import Checkpoints
from surgery.train.options import Settings
from surgery.train.registry import find_objective
from surgery.train.request import HELD_OUT, Lesson
from surgery.train.watchers import TensorBoard, Watcher

if TYPE_CHECKING:
    from surgery.train.data import Rows
    from surgery.train.loop import Result


class TrainCommand(GroupCommand):
    """A command that takes an objective."""

    flag = "--objective"

    def find(self, plugins: Plugins, name: str) -> type[Configured]:
        return find_objective(plugins, name).cls

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(
            ctx.command_path, "MODEL --objective NAME [ITS OPTIONS] --data FILE… -o DIR [OPTIONS]"
        )


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each field of Settings; what was given arrives by the field's name, the rest as None."""
    for row, (name, info) in reversed(
        list(zip(describe_options(Settings), Settings.model_fields.items(), strict=True))
    ):
        several = name == "regularize"
        choices = [c for c in get_args(info.annotation) if isinstance(c, str)]
        kind: Any = click.Choice(choices) if choices else int if name == "seed" else str
        flag = info.annotation is bool
        about = row["description"][0].upper() + row["description"][1:]
        shown = f" [default: {info.default}]" if info.default not in (None, (), False) else ""
        function = click.option(
            row["option"],
            name,
            **({"is_flag": True} if flag else {"type": kind, "multiple": several}),
            metavar=None if choices or flag else "TEXT" if several else "N",
            help=f"{about}.{shown}",
        )(function)
    return function


@click.command(cls=TrainCommand)
@click.argument("model")
@output_option
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="[NAME=]FILE",
    help="JSONL, CSV, Parquet or text files of one format, or a directory; may be repeated. NAME: of the task that "
    "learns from it, where there are several.",
)
@click.option(
    "--held-out",
    default=HELD_OUT,
    show_default=True,
    metavar="SHARE|FILE",
    help="A share of the data, or a file, to score on; 0: none.",
)
@click.option("--tokenizer", metavar="DIR", help="A tokenizer in place of that which lies with the model.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of a run that was stopped.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's event files beside the log.")
@settings_options
@overwrite_option
@json_option
@model_options
@click.pass_context
def train(
    ctx: click.Context,
    model: str,
    output: Path,
    data: tuple[str, ...],
    held_out: str,
    tokenizer: str | None,
    resume: bool,
    tensorboard: bool,
    overwrite: bool,
    as_json: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
    **given: Any,
) -> None:
    """Train what a program lets train, and save it. Options after --objective NAME belong to it.

    Checkpoints and the log lie in DIR.run; --resume goes on there, to the weights that an uninterrupted run has.
    """
    groups = ctx.meta["groups"]
    if len(groups) != 1:
        raise TrainingError("give one --objective NAME; `surgery objectives` lists them")
    name, options = groups[0]
    own = {"objective": {**options, "name": name}, "data": data, "held_out": held_out, "tokenizer": tokenizer}
    lesson = Lesson.parse({**given, **own}, plugins)
    refuse_taken(output, overwrite)
    checkpoints = begin(output, resume, overwrite)
    rows = lesson.rows()
    result = teach(loader(model), lesson, rows, output, resume, overwrite, tensorboard, as_json)
    if result is not None and as_json:
        click.echo(json.dumps({**vars(result), "path": str(output), "log": str(checkpoints / "log.jsonl")}))


def begin(output: Path, resume: bool, overwrite: bool) -> Path:
    """Where the checkpoints of a training to `output` lie; those of an earlier one are in the way, or removed."""
    run = output.with_name(output.name + ".run")
    if Checkpoints(run).steps() and not resume:
        if not overwrite:
            raise SurgeryError(
                f"{run} holds a run that was stopped; --resume goes on, --overwrite begins anew"
            )
        if _is_main():
            Checkpoints(run).clear()
    return run


def teach(
    program: Program,
    lesson: Lesson,
    rows: Rows,
    output: Path,
    resume: bool,
    overwrite: bool,
    tensorboard: bool,
    quietly: bool,
) -> Result | None:
    """Train a program, in place, and save it; what came of it is printed (unless quietly) by the main process, which
    alone gets it."""
    from surgery.train.loop import Loop
    from surgery.train.tokenizers import find_tokenizer

    out, run = console(), output.with_name(output.name + ".run")
    watchers: list[Watcher] = [] if quietly or not _is_main() else [_Live(out, lesson.objective.metric)]
    if tensorboard and _is_main():
        watchers.append(TensorBoard(run / "tensorboard"))
    tokenizer = find_tokenizer(program, lesson.tokenizer)
    loop = Loop(program, lesson.objective, rows, lesson.settings, run, tokenizer, watchers)
    if _is_main() and not quietly:
        out.print(f"{trainable_line(program)}; {len(loop.data):,} examples, {loop.steps:,} steps")
    result = loop.run(resume)
    if not _is_main():
        return None
    program.save(output, overwrite=overwrite)
    Checkpoints(run).clear()
    if not quietly:
        _tell(out, result, output, run)
    return result


def _is_main() -> bool:
    """Of the processes of torchrun or accelerate launch."""
    return os.environ.get("RANK", "0") == "0"


def _tell(out: Any, result: Result, output: Path, run: Path) -> None:
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
    """Progress in the terminal: loss, rate of tokens, time left; a line for each evaluation and note."""

    def __init__(self, out: Any, metric: str) -> None:
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
            self.out.print(f"going on from the checkpoint of step {step}")
        self.task = self.progress.add_task(
            "", total=steps, completed=step, loss=float("nan"), speed=0.0, score=""
        )
        self.progress.start()

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        now = perf_counter()
        speed, self.time = tokens / max(now - self.time, 1e-9), now
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        self.tokens = speed if not self.tokens else 0.9 * self.tokens + 0.1 * speed
        self.progress.update(self.task, completed=step, loss=self.loss, speed=self.tokens, score=self.score)

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        if self.metric in figures:
            self.score = f"{self.metric} {figures[self.metric]:.4g}"
            self.progress.update(self.task, score=self.score)

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        said = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.progress.print(Text(f"step {step}: {said}{' (best)' if best else ''}"))
        self.score, self.time = f"{self.metric} {metrics[self.metric]:.4g}", perf_counter()
        self.progress.update(self.task, score=self.score)

    def noted(self, step: int, sentence: str) -> None:
        self.progress.print(Text(f"step {step}: {sentence}", style="yellow"))

    def ended(self) -> None:
        self.progress.stop()


@click.command()
@click.argument("name", required=False)
@write_option
@json_option
@click.pass_obj
def objectives(plugins: Plugins, name: str | None, write: Path | None, as_json: bool) -> None:
    """List objectives with the distribution each comes from, or one objective's options."""
    if write is not None:
        console().print(f"wrote {len(write_pages(objective_pages(plugins), write))} pages into {write}")
        return
    if name is None:
        list_registered(registry.objectives(plugins), "objective", as_json)
        return
    info = find_objective(plugins, name)
    show_registered(info, as_json, f"chooses the best by: {info.cls.metric}")


COMMANDS = [train, objectives]
