"""The command train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.choices import HELD_OUT
from surgery.cli.options import json_option, model_options, output_option, overwrite_option, track_options
from surgery.cli.pass_groups import ObjectiveCommand
from surgery.cli.settings import settings_options
from surgery.common.errors import TrainingError

if TYPE_CHECKING:
    from surgery.common.plugins import Plugins
    from surgery.engine.program import Program


@click.command(cls=ObjectiveCommand)
@click.argument("model")
@output_option
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="[NAME=]FILE",
    help="JSONL, CSV, Parquet or text files of one format, or a directory; may be repeated. NAME: the task that "
    "learns from the file, for an objective with several tasks.",
)
@click.option(
    "--held-out",
    default=HELD_OUT,
    show_default=True,
    metavar="SHARE|FILE",
    help="Share of the data to hold out for evaluation, or a file of such data; 0: none.",
)
@click.option("--tokenizer", metavar="DIR", help="Tokenizer to use instead of the model's own.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint of an interrupted run.")
@track_options
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
    track: tuple[str, ...],
    tensorboard: bool,
    overwrite: bool,
    as_json: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
    **given: Any,
) -> None:
    """Train the trainable parameters of a program and save it. Options after --objective NAME belong to it.

    Checkpoints and the log are written to DIR.run. A run that is interrupted and continued with --resume ends with the
    same weights as an uninterrupted run.
    """
    from surgery.cli.training import head_for, prepare_run, train_program
    from surgery.common.files import refuse_taken
    from surgery.train.request import TrainingRequest

    groups = ctx.meta["groups"]
    if len(groups) != 1:
        raise TrainingError("give exactly one --objective NAME; `surgery objectives` lists them")
    name, options = groups[0]
    own = {"objective": {**options, "name": name}, "data": data, "held_out": held_out, "tokenizer": tokenizer}
    request = TrainingRequest.parse({**given, **own}, plugins)
    refuse_taken(output, overwrite)
    run_directory = prepare_run(output, resume, overwrite)
    # Data are read before the model, so that an error in a file is reported at once.
    rows = request.rows()
    result = train_program(
        loader(model, choose=head_for(request, rows)),
        request,
        rows,
        output,
        resume=resume,
        overwrite=overwrite,
        track=(*track, *(["tensorboard"] if tensorboard else ())),
        quiet=as_json,
    )
    if result is not None and as_json:
        click.echo(json.dumps({**vars(result), "path": str(output), "log": str(run_directory / "log.jsonl")}))
