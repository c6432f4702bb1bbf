"""Commands that change nothing: inspect, view, passes, objectives, plan, diff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.options import compared_option, data_option, folding_options, json_option, model_options
from surgery.cli.pass_groups import PassCommand
from surgery.cli.plugins import pass_plugins

if TYPE_CHECKING:
    from surgery.common.folding import Folding
    from surgery.common.plugins import Plugins
    from surgery.engine.program import Program

write_option = click.option(
    "--write", type=click.Path(path_type=Path), metavar="DIR", help="Write a reference page for each."
)


@click.command()
@click.argument("model")
@folding_options
@json_option
@model_options
def inspect(
    model: str, as_json: bool, folding: Folding, plugins: Plugins, loader: Callable[..., Program]
) -> None:
    """Print a model as a tree of sites: role, op, weight shape, trainable or frozen, ties."""
    from surgery.cli.program_view import show_program

    show_program(loader(model), model, as_json, folding)


@click.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="HTML file to write, such as model.html.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "model-explorer"]),
    default="html",
    help="html, or the JSON that Model Explorer opens (name the file model.json).",
)
@click.option("--overwrite", is_flag=True, help="Replace the output file.")
@model_options
def view(
    model: str,
    output: Path,
    form: str,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Write a model as one HTML page: a tree of modules, the graph of the opened one, roles, shapes, weights, ties.

    The page needs no network and no server. Open it in a browser; "?" lists its keys.
    """
    from surgery.cli.pictures import refuse_existing, write_view

    refuse_existing(output, overwrite)
    write_view(loader(model), model, output, form)


@click.command()
@click.argument("name", required=False)
@write_option
@json_option
@pass_plugins
def passes(plugins: Plugins, name: str | None, write: Path | None, as_json: bool) -> None:
    """List passes and their distributions, or the options of the pass NAME."""
    from surgery.cli.views import show_passes

    show_passes(plugins, name, write, as_json)


@click.command()
@click.argument("name", required=False)
@write_option
@json_option
@pass_plugins
def objectives(plugins: Plugins, name: str | None, write: Path | None, as_json: bool) -> None:
    """List objectives and their distributions, or the options of the objective NAME."""
    from surgery.cli.views import show_objectives

    show_objectives(plugins, name, write, as_json)


@click.command()
@json_option
@pass_plugins
def plugins(plugins: Plugins, as_json: bool) -> None:
    """List the installed plugins: what each adds, what is broken and why, and what is left out."""
    from surgery.cli.installed import show_plugins

    show_plugins(plugins, as_json)


@click.command(cls=PassCommand)
@click.argument("model", required=False)
@click.option("--recipe", type=click.Path(path_type=Path), help="Read the passes from a recipe file.")
@click.option(
    "--freeze-base/--no-freeze-base",
    default=None,
    help="Freeze the base first (default: if a pass needs it).",
)
@click.option("--why", is_flag=True, help="List near misses of a pass's pattern, with the reason for each.")
@data_option
@folding_options
@json_option
@model_options
@click.pass_context
def plan(
    ctx: click.Context,
    model: str | None,
    recipe: Path | None,
    freeze_base: bool | None,
    why: bool,
    data: tuple[Path, ...],
    as_json: bool,
    folding: Folding,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Show what `apply` would do: sites, refusals, ties, added parameters. Changes nothing."""
    from surgery.cli.loading import read_data
    from surgery.cli.plan_view import show_plan
    from surgery.cli.recipe import wanted_recipe

    wanted = wanted_recipe(ctx, model, recipe, freeze_base, plugins)
    program = loader(wanted.model, wanted)
    report = program.plan(*wanted.passes, freeze_base=wanted.freeze_base, data=read_data(program, data))
    show_plan(program, report, wanted, why, as_json, folding)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write the difference as one HTML page: graph, weights, and how far each value moved.",
)
@click.option("--no-values", is_flag=True, help="With --html: do not run the models to compare their values.")
@click.option("--overwrite", is_flag=True, help="Replace the HTML file.")
@compared_option
@folding_options
@json_option
@model_options
def diff(
    a: str,
    b: str,
    html: Path | None,
    no_values: bool,
    overwrite: bool,
    data: tuple[Path, ...],
    as_json: bool,
    folding: Folding,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """List the nodes and weights that differ between A and B.

    With --html, both models are run on the example inputs, or on --data. The page shows how far the value of each op
    moved, and at which block an error begins.
    """
    from surgery.cli.diff_view import show_diff
    from surgery.cli.loading import load_sides
    from surgery.cli.pictures import refuse_existing, write_difference

    if html is None and (no_values or data):
        raise click.UsageError("--no-values and --data are for --html; name a file with --html diff.html")
    if html is not None:
        refuse_existing(html, overwrite)
    of_a, of_b = load_sides(loader, a, b)
    first, second = of_a(a), of_b(b)
    show_diff(first, second, as_json, folding)
    if html is not None:
        write_difference(first, second, (a, b), html, values=not no_values, data=data, quiet=as_json)
