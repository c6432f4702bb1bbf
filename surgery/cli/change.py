"""Commands that write a changed program: apply, merge, combine, undo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.choices import COMBINE_METHODS, MAJORITIES, QUANTIZED_MERGES
from surgery.cli.completion import complete_adapters
from surgery.cli.options import data_option, model_options, output_option, overwrite_option, with_adapters
from surgery.cli.pass_groups import PassCommand
from surgery.common.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.common.plugins import Plugins
    from surgery.engine.contract.combination import Majority
    from surgery.engine.contract.folds import How
    from surgery.engine.program import Program

DTYPES = ("float32", "float16", "bfloat16")
standalone_option = click.option("--standalone", is_flag=True, help="Also write the weights of the base.")


@click.command(cls=PassCommand)
@click.argument("model", required=False)
@output_option
@click.option("--recipe", type=click.Path(path_type=Path), help="Read the passes from a recipe file.")
@click.option("--save-recipe", type=click.Path(path_type=Path), help="Write the passes as a recipe file.")
@click.option(
    "--freeze-base/--no-freeze-base",
    default=None,
    help="Freeze the base first (default: if a pass needs it).",
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Convert the model to this dtype first (default: as stored)."
)
@data_option
@click.option("--no-verify", is_flag=True, help="Do not compare outputs before and after each pass.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of randomly initialized tensors.")
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
    dtype: str | None,
    data: tuple[Path, ...],
    no_verify: bool,
    seed: int,
    standalone: bool,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Apply passes and save the result. Options after --pass NAME belong to that pass."""
    from surgery.cli.loading import read_data
    from surgery.cli.recipe import wanted_recipe, write_recipe
    from surgery.cli.render import console, note_unfrozen, trainable_line
    from surgery.cli.reports import tell_applied
    from surgery.common.files import refuse_file, refuse_taken

    wanted = wanted_recipe(ctx, model, recipe, freeze_base, plugins)
    refuse_taken(output, overwrite)
    if save_recipe is not None:
        refuse_file(save_recipe, overwrite, "--save-recipe")
    program = loader(wanted.model, wanted, dtype=dtype)
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
        # A failed command leaves nothing behind, as if it had not run.
        if save_recipe is not None:
            save_recipe.unlink(missing_ok=True)
        raise
    out = console()
    tell_applied(out, program, result)
    note_unfrozen(out, wanted.passes, wanted.freeze_base)
    out.print(f"{trainable_line(result)}; wrote {output}")


@click.command()
@click.argument("directory")
@output_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["surgery", "hf", "diffusers"]),
    default="surgery",
    show_default=True,
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="With --format hf: split the weights into files of at most this size, such as 5GB.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Convert the model and its adapters to this dtype before merging (default: as stored).",
)
@click.option(
    "--quantized",
    type=click.Choice(QUANTIZED_MERGES),
    default="keep",
    show_default=True,
    help="Adapters on quantized weights. keep: leave the branch. requantize: compute new codes. residual: new codes "
    "and a low-rank correction. auto: the smaller of the last two that stays within --budget, else keep.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=False),
    default=0.1,
    show_default=True,
    help="Largest share of an adapter's contribution that a merge into quantized weights may lose. It is measured on "
    "the outputs for --data, or on the weights where no data reach them.",
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
    dtype: str | None,
    quantized: How,
    budget: float,
    data: tuple[Path, ...],
    standalone: bool,
    overwrite: bool,
    choose: Callable[[Program], Program],
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Merge adapters into the base weights. The result has the base's names and nodes."""
    from surgery.capture.sentence.layout import is_sentence_directory
    from surgery.cli.loading import read_data
    from surgery.cli.render import console
    from surgery.cli.reports import tell_merged
    from surgery.common.files import refuse_taken
    from surgery.engine.replay import live_entries
    from surgery.store.diffusers import write_diffusers
    from surgery.store.hf import write_hf

    if max_shard_size and format_ != "hf":
        raise SurgeryError("--max-shard-size needs --format hf; add --format hf or remove --max-shard-size")
    refuse_taken(output, overwrite)
    program = choose(loader(directory, dtype=dtype))
    # No live entry: the program was merged before, or only weights of the base were trained.
    plain = not live_entries(program.journal)
    merged = program
    if not (plain and format_ != "surgery"):
        merged = program.merge(quantized=quantized, budget=budget, data=read_data(program, data))
    entry = next((e for e in reversed(merged.journal.entries) if e.kind == "merge"), None)
    if format_ == "hf":
        write_hf(merged, output, overwrite=overwrite, max_shard_size=max_shard_size)
        library = "sentence-transformers" if is_sentence_directory(output) else "transformers"
        kind = f" (a {library} directory)"
    elif format_ == "diffusers":
        whole = write_diffusers(merged, output, overwrite=overwrite)
        kind = " (a pipeline of diffusers)" if whole else " (a part of a pipeline of diffusers)"
    else:
        kind = ""
        merged.save(output, standalone=standalone, overwrite=overwrite)
    out = console()
    tell_merged(out, merged, entry)
    out.print(f"wrote {output}{kind}")


@click.command()
@click.argument("directory")
@output_option
@click.option(
    "--weight",
    "weights",
    multiple=True,
    required=True,
    metavar="ADAPTER=W",
    shell_complete=complete_adapters,
    help="Name and weight of a source adapter; repeat for each source.",
)
@click.option(
    "--method",
    type=click.Choice(COMBINE_METHODS),
    default="svd",
    show_default=True,
    help="cat: the exact weighted sum, whose rank is the sum of the ranks. svd: its best approximation of --rank. "
    "*_svd: apply the rule to the dense updates B·A, then approximate with --rank. Others: apply the rule to A and "
    "to B.",
)
@click.option("--as", "label", required=True, metavar="NAME", help="Name of the result.")
@click.option(
    "--rank", type=int, help="Rank of the result, for svd methods (default: the largest of the sources)."
)
@click.option(
    "--density",
    type=float,
    help="Fraction of values to keep: required by ties, dare and magnitude_prune, refused by other methods.",
)
@click.option(
    "--majority",
    type=click.Choice(MAJORITIES),
    default="total",
    show_default=True,
    help="Sign election of ties: by total magnitude, or by frequency.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the values that dare drops.")
@click.option("--keep", is_flag=True, help="Keep the source adapters in the directory, at weight 0.")
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
    """Combine several adapters into one, as PEFT's add_weighted_adapter does. Other adapters stay as they are."""
    from surgery.cli.loading import read_weights
    from surgery.cli.names import check_adapters
    from surgery.cli.render import console
    from surgery.common.files import refuse_taken
    from surgery.engine.change.combine import combine as combine_adapters
    from surgery.engine.contract.combination import Combination

    refuse_taken(output, overwrite)
    wanted = read_weights(weights)
    check_adapters(directory, wanted)
    if len(wanted) < len(weights):
        raise SurgeryError("an adapter is named twice; give each adapter one --weight")
    # Made first: options that do not fit together are refused before a model is loaded.
    how = Combination(method, rank, density, majority, seed)
    combined = combine_adapters(loader(directory), wanted, how, label, keep)
    combined.save(output, overwrite=overwrite)
    entry = combined.journal.find(label)[0]
    observed = entry.numerics["observed"]
    made = f"rank {entry.options['rank']}, " if "rank" in entry.options else ""
    console().print(f"{entry.id}: {made}{len(entry.sites)} sites; {observed}; wrote {output}")


def _what_is_left(program: Program) -> str:
    """What a program without passes differs in from its base."""
    import torch

    base = program.base.tensors
    trained = [name for name, tensor in program.changed.items() if not torch.equal(tensor, base[name])]
    if not trained:
        return "nothing: it is the base, bit for bit"
    first = f"{trained[0]}, …" if len(trained) > 1 else trained[0]
    return f"nothing, but {len(trained)} tensors of the base keep their trained values ({first}); --all restores them"


@click.command()
@click.argument("directory")
@click.option(
    "--pass",
    "name",
    metavar="PASS",
    shell_complete=complete_adapters,
    help="Pass to undo, by name, id or --as name.",
)
@click.option("--all", "everything", is_flag=True, help="Undo every pass: restores the base bit for bit.")
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
    """Remove a pass and its tensors. Everything else that was trained is kept."""
    from surgery.cli.names import check_adapters
    from surgery.cli.render import console
    from surgery.common.files import refuse_taken

    if (name is None) == (not everything):
        raise click.UsageError("give either --pass NAME or --all")
    refuse_taken(output, overwrite)
    check_adapters(directory, [] if name is None else [name])
    program = loader(directory)
    undone = program.undo_all() if everything else program.undo(str(name))
    undone.save(output, overwrite=overwrite)
    kept = {e.id for e in undone.journal}
    removed = ", ".join(e.id for e in program.journal if e.id not in kept) or "nothing"
    left = ", ".join(
        f"{e.id} (left out)" if e.weight == 0 else e.id for e in undone.journal
    ) or _what_is_left(undone)
    console().print(f"undone: {removed}; left in the journal: {left}; wrote {output}")
