"""The command run, which carries out a whole recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.options import json_option, loading_options, output_option, track_options
from surgery.cli.plugins import plugins_of

if TYPE_CHECKING:
    from surgery.common.plugins import Plugins
    from surgery.engine.program import Program


def _print_schema(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the JSON Schema of recipes and exit, if --schema is given."""
    if not value or ctx.resilient_parsing:
        return
    from surgery.cli.recipe_schema import recipe_schema

    click.echo(json.dumps(recipe_schema(plugins_of(ctx)), indent=1, ensure_ascii=False))
    ctx.exit()


@click.command()
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of recipes, for editors, and exit.",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@output_option
@click.option("--resume", is_flag=True, help="Continue an interrupted run; its finished stages are kept.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run at the output path.")
@click.option(
    "--allow-code",
    multiple=True,
    metavar="CODE",
    help="Let the recipe run this code (py:MODULE:CALLABLE, MODULE:FUNCTION); may be repeated.",
)
@track_options
@json_option
@loading_options
def run(
    recipe: Path,
    model: str | None,
    output: Path,
    resume: bool,
    overwrite: bool,
    allow_code: tuple[str, ...],
    track: tuple[str, ...],
    tensorboard: bool,
    as_json: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Run a recipe: base, passes, training, merge, ONNX export. DIR gets a directory for each stage.

    MODEL replaces the recipe's model. Paths in the recipe are relative to the current directory.
    """
    from surgery.cli.stages import run_recipe

    run_recipe(
        recipe,
        model,
        output,
        plugins=plugins,
        loader=loader,
        allowed=allow_code,
        resume=resume,
        overwrite=overwrite,
        track=(*track, *(["tensorboard"] if tensorboard else ())),
        as_json=as_json,
    )
