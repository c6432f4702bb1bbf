"""Commands that make a changed program: apply, merge, combine, undo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.text import Text

from surgery.cli.data import data_option, read_data
from surgery.cli.options import (
    model_options,
    output_option,
    overwrite_option,
    read_weights,
    with_adapters,
)
from surgery.cli.pass_groups import PassCommand
from surgery.cli.recipe import write_recipe
from surgery.cli.render import choices_table, console, count, note_unfrozen, outcome, trainable_line
from surgery.cli.see import wanted_recipe
from surgery.common.errors import SurgeryError
from surgery.common.files import refuse_taken
from surgery.common.plugins import Plugins
from surgery.engine.change.combine import combine as combine_
from surgery.engine.change.selection import in_words
from surgery.engine.contract.combination import METHODS, Combination, Majority
from surgery.engine.contract.folds import How
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.store.hf import write_hf

standalone_option = click.option("--standalone", is_flag=True, help="Write the base's weights too.")


@click.command(cls=PassCommand)
@click.argument("model", required=False)
@output_option
@click.option("--recipe", type=click.Path(path_type=Path), help="Read the passes from a recipe file.")
@click.option("--save-recipe", type=click.Path(path_type=Path), help="Write the passes as a recipe file.")
@click.option(
    "--freeze-base/--no-freeze-base", default=None, help="Freeze the base first (default: where needed)."
)
@data_option
@click.option("--no-verify", is_flag=True, help="Do not compare outputs before and after each pass.")
@click.option("--seed", type=int, default=0, show_default=True, help="For tensors that start at random.")
@standalone_option
@overwrite_option
@model_options
@click.pass_context
def apply(
    ctx: click.Context,
    model: str | None,
    output: Path,
    recipe: Path | None,
    save_recipe: Path | None,
    freeze_base: bool | None,
    data: tuple[Path, ...],
    no_verify: bool,
    seed: int,
    standalone: bool,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Apply passes and save the result. Options after --pass NAME belong to that pass."""
    wanted = wanted_recipe(ctx, model, recipe, freeze_base, plugins)
    refuse_taken(output, overwrite)
    if save_recipe is not None and save_recipe.exists() and not overwrite:
        raise SurgeryError(f"{save_recipe} exists; choose another --save-recipe, or pass --overwrite")
    program = loader(wanted.model, wanted)
    result = program.apply(
        *wanted.passes,
        freeze_base=wanted.freeze_base,
        verify=not no_verify,
        data=read_data(program, data),
    )
    if save_recipe is not None:
        write_recipe(save_recipe, wanted)
    try:
        result.save(output, standalone=standalone, overwrite=overwrite)
    except SurgeryError:
        if save_recipe is not None:
            save_recipe.unlink(missing_ok=True)
        raise
    out = console()
    tell_applied(out, program, result)
    note_unfrozen(out, wanted.passes, wanted.freeze_base)
    out.print(f"{trainable_line(result)}; wrote {output}")


def tell_applied(out: Console, before: Program, result: Program) -> None:
    """A line for each pass that was applied since, and for a freeze that the pipeline put before them."""
    for report in result.reports[len(before.reports) :]:
        entry, planned = report.entry, report.plan
        line = Text(f"{entry.id}: ", style="bold")
        if entry.kind == "rewrite":
            line.append(f"{len(entry.sites)} sites, {count(planned.parameters)} parameters; outputs ")
            line.append(outcome(report))
            if entry.trains:
                line.append(f"; of the base {in_words(entry, result.tensors)}")
        else:
            line.append(in_words(entry, result.tensors) + (" (added by the pipeline)" if entry.auto else ""))
        out.print(line)
        for row in planned.refused:
            out.print(Text(f"  refused {row.site.path}: {row.refusal}", style="yellow"))
        for sentence in planned.notes:
            out.print(Text(f"  note: {sentence}", style="yellow"))


@click.command()
@click.argument("directory")
@output_option
@click.option(
    "--format", "format_", type=click.Choice(["surgery", "hf"]), default="surgery", show_default=True
)
@click.option(
    "--max-shard-size", metavar="SIZE", help="With --format hf: split the weights into files of 5GB, say."
)
@click.option(
    "--quantized",
    type=click.Choice(get_args(How)),
    default="keep",
    show_default=True,
    help="Of adapters on quantized weights. requantize: new codes. residual: codes and a low-rank correction. "
    "auto: the smaller of these within the --budget, else the branch stays.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=False),
    default=0.1,
    show_default=True,
    help="The part of what adapters add to an op's outputs on the data that may be lost; of their values, where no "
    "data go.",
)
@data_option
@standalone_option
@overwrite_option
@with_adapters
@model_options
def merge(
    directory: str,
    output: Path,
    format_: str,
    max_shard_size: str | None,
    quantized: How,
    budget: float,
    data: tuple[Path, ...],
    standalone: bool,
    overwrite: bool,
    choose: Callable[[Program], Program],
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Fold adapters into the base weights: original names, original nodes."""
    if max_shard_size and format_ != "hf":
        raise SurgeryError("--max-shard-size is for --format hf; add that, or leave it out")
    refuse_taken(output, overwrite)
    program = choose(loader(directory))
    plain = not live_entries(program.journal)  # merged before, or only weights of the base were trained
    merged = program
    if not (plain and format_ == "hf"):
        merged = program.merge(quantized=quantized, budget=budget, data=read_data(program, data))
    entry = next((e for e in reversed(merged.journal.entries) if e.kind == "merge"), None)
    if format_ == "hf":
        write_hf(merged, output, overwrite=overwrite, max_shard_size=max_shard_size)
    else:
        merged.save(output, standalone=standalone, overwrite=overwrite)
    out = console()
    tell_merged(out, merged, entry)
    out.print(f"wrote {output}" + (" (a transformers directory)" if format_ == "hf" else ""))


def tell_merged(out: Console, merged: Program, entry: Entry | None) -> None:
    """What a merge did; entry: its own, or None where there was none to do."""
    if entry is None:
        out.print("no adapter to fold; the base's weights as they were trained")
    else:
        folded, plain = entry.options["folded"], entry.options.get("simplified", ())
        done = [f"folded {', '.join(folded)} into {len(merged.folded())} weights"] if folded else []
        done += [f"computed {', '.join(plain)} once"] if plain else []
        coded = entry.options.get("into_codes", {})
        done += [f"put {', '.join(coded)} into codes"] if coded else []
        seen = entry.numerics.get("observed", "as merged before")
        how = "outputs changed" if coded and seen != "bit for bit" else "outputs as before"
        out.print(f"{'; '.join(done)}; {how}, {seen}; {len(merged.graph.nodes)} nodes")
        if entry.options.get("choices"):
            out.print(choices_table(entry.options["choices"]))
        for name, why in entry.options.get("kept", {}).items():
            out.print(Text(f"  kept {name}: {why}", style="yellow"))


@click.command()
@click.argument("directory")
@output_option
@click.option(
    "--weight",
    "weights",
    multiple=True,
    required=True,
    metavar="ADAPTER=W",
    help="An adapter, and its weight.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="svd",
    show_default=True,
    help="cat: the weighted sum itself, of the summed rank. svd: the nearest to it of --rank. ties_svd and the like: "
    "the rule on the whole updates B·A, then the nearest of --rank. The others: the rule on A and on B.",
)
@click.option("--as", "label", required=True, metavar="NAME", help="A name for the result.")
@click.option("--rank", type=int, help="Rank of the result, for the svd methods (default: the largest).")
@click.option(
    "--density",
    type=float,
    help="Fraction of values to keep: needed by ties, dare and magnitude_prune, and by no other.",
)
@click.option(
    "--majority",
    type=click.Choice(["total", "frequency"]),
    default="total",
    show_default=True,
    help="How ties elects a sign.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what dare drops.")
@click.option("--keep", is_flag=True, help="Keep the sources in the directory, at weight 0.")
@overwrite_option
@model_options
def combine(
    directory: str,
    output: Path,
    weights: tuple[str, ...],
    method: str,
    label: str,
    rank: int | None,
    density: float | None,
    majority: Majority,
    seed: int,
    keep: bool,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Make one adapter of several, as PEFT's add_weighted_adapter does. Others stay as they are."""
    refuse_taken(output, overwrite)
    wanted = read_weights(weights)
    if len(wanted) < len(weights):
        raise SurgeryError("an adapter is named twice; give each one --weight")
    how = Combination(method, rank, density, majority, seed)  # refused before a model is loaded
    combined = combine_(loader(directory), wanted, how, label, keep)
    combined.save(output, overwrite=overwrite)
    entry = combined.journal.find(label)[0]
    said = entry.numerics["observed"]
    made = f"rank {entry.options['rank']}, " if "rank" in entry.options else ""
    console().print(f"{entry.id}: {made}{len(entry.sites)} sites; {said}; wrote {output}")


@click.command()
@click.argument("directory")
@click.option("--pass", "name", metavar="PASS", help="The pass to undo, by name, id or --as name.")
@click.option("--all", "everything", is_flag=True, help="Undo everything: the base, bit for bit.")
@output_option
@overwrite_option
@model_options
def undo(
    directory: str,
    name: str | None,
    everything: bool,
    output: Path,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Remove one pass and its tensors; what else was trained is kept."""
    if (name is None) == (not everything):
        raise click.UsageError("say which pass with --pass NAME, or --all")
    refuse_taken(output, overwrite)
    program = loader(directory)
    undone = program.undo_all() if everything else program.undo(str(name))
    undone.save(output, overwrite=overwrite)
    kept = {e.id for e in undone.journal}
    gone = ", ".join(e.id for e in program.journal if e.id not in kept) or "nothing"
    left = (
        ", ".join(f"{e.id} (left out)" if e.weight == 0 else e.id for e in undone.journal)
        or "nothing: it is the base, bit for bit"
    )
    console().print(f"undone: {gone}; left in the journal: {left}; wrote {output}")


COMMANDS = [apply, merge, combine, undo]
