"""Commands for PEFT checkpoints: import-peft, export-peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from surgery.cli.options import (
    loading_options,
    model_options,
    output_option,
    overwrite_option,
    with_adapters,
)

if TYPE_CHECKING:
    from surgery.common.plugins import Plugins
    from surgery.engine.journal import Entry
    from surgery.engine.program import Program

_F = TypeVar("_F", bound=Callable[..., Any])


def _as_lora(command: _F) -> _F:
    """The option `--as-lora RANK`."""
    decorate = click.option(
        "--as-lora",
        "as_lora",
        type=click.IntRange(min=1),
        metavar="RANK",
        help="Turn whole weights (delta) into the nearest LoRA of this rank; the error is printed.",
    )
    return decorate(command)


def _remark(program: Program, entry: Entry) -> str:
    """Note on a journal entry: the source of its values, or its distance from them."""
    from surgery.engine.replay import pass_of
    from surgery.passes.delta import Delta

    if entry.numerics.get("declared") == "factored from a delta":
        return f"; {entry.numerics['observed']}"
    pass_ = pass_of(entry, program.base.plugins)
    if isinstance(pass_, Delta) and pass_.origin is not None:
        kind = pass_.origin.config.get("peft_type")
        return f", the weights that PEFT merged from {kind}; export-peft gives the checkpoint back"
    return ""


@click.command("import-peft")
@click.argument("directory", type=click.Path(path_type=Path))
@output_option
@click.option("--base", "model", required=True, metavar="MODEL", help="Base model of the checkpoint.")
@click.option("--as", "label", default="", metavar="NAME", help="Name of the adapter in the program.")
@_as_lora
@overwrite_option
@loading_options
def import_(
    directory: Path,
    model: str,
    output: Path,
    label: str,
    as_lora: int | None,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Load a PEFT checkpoint onto its base model and save the result as a surgery directory.

    LoRA, IA3, prefix and prompt become the passes of that name. Of every other type that PEFT can merge, the merged
    weights become the pass delta; this needs peft.
    """
    from surgery.cli.render import console, trainable_line
    from surgery.common.files import refuse_taken
    from surgery.store.peft import import_peft

    refuse_taken(output, overwrite)
    base = loader(model)
    program = import_peft(directory, base, label=label, as_lora=as_lora)
    program.save(output, overwrite=overwrite)
    out = console()
    for entry in program.journal.entries[len(base.journal) :]:
        if entry.kind == "rewrite":
            out.print(f"{entry.id}: {len(entry.sites)} sites{_remark(program, entry)}")
    out.print(f"{trainable_line(program)}; wrote {output}")


@click.command("export-peft")
@click.argument("directory")
@output_option
@_as_lora
@overwrite_option
@with_adapters
@model_options
def export(
    directory: str,
    output: Path,
    as_lora: int | None,
    overwrite: bool,
    choose: Callable[[Program], Program],
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Write the adapters of a saved directory as a PEFT checkpoint: LoRA, IA3, prefix or prompt.

    A delta that was imported from another type gives its checkpoint back as it came. Where peft is installed, it loads
    what was written, and its outputs are compared.
    """
    from surgery.cli.render import console
    from surgery.common.files import refuse_taken
    from surgery.store.peft import export_peft
    from surgery.store.peft.factored import nearest_lora
    from surgery.store.peft.loads import can_check

    refuse_taken(output, overwrite)
    program = choose(loader(directory))
    if as_lora is not None:
        program = nearest_lora(program, as_lora)
        for entry in program.journal:
            if said := _remark(program, entry):
                console().print(f"{entry.id}{said}")
    config = export_peft(program, output, overwrite=overwrite)
    targets = config.get("target_modules")
    modules = len(targets) if isinstance(targets, list) else 0
    whole = config.get("modules_to_save")
    saved = f", and {', '.join(whole)} whole" if isinstance(whole, list) and whole else ""
    checked = "; PEFT loads it with the program's outputs" if can_check(program) else ""
    console().print(
        f"{config['peft_type']}{f' at {modules} modules' if modules else ''}{saved}; wrote {output}{checked}"
    )
