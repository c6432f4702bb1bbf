"""Commands for PEFT checkpoints: import-peft, export-peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
    from surgery.engine.program import Program


@click.command("import-peft")
@click.argument("directory", type=click.Path(path_type=Path))
@output_option
@click.option("--base", "model", required=True, metavar="MODEL", help="Base model of the checkpoint.")
@click.option("--as", "label", default="", metavar="NAME", help="Name of the adapter in the program.")
@overwrite_option
@loading_options
def import_(
    directory: Path,
    model: str,
    output: Path,
    label: str,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Load a PEFT checkpoint onto its base model and save the result as a surgery directory."""
    from surgery.cli.render import console, trainable_line
    from surgery.common.files import refuse_taken
    from surgery.store.peft import import_peft

    refuse_taken(output, overwrite)
    base = loader(model)
    program = import_peft(directory, base, label=label)
    program.save(output, overwrite=overwrite)
    out = console()
    for entry in program.journal.entries[len(base.journal) :]:
        if entry.kind == "rewrite":
            out.print(f"{entry.id}: {len(entry.sites)} sites")
    out.print(f"{trainable_line(program)}; wrote {output}")


@click.command("export-peft")
@click.argument("directory")
@output_option
@overwrite_option
@with_adapters
@model_options
def export(
    directory: str,
    output: Path,
    overwrite: bool,
    choose: Callable[[Program], Program],
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Write the adapters of a saved directory as a PEFT checkpoint: LoRA, IA3, prefix or prompt."""
    from surgery.cli.render import console
    from surgery.common.files import refuse_taken
    from surgery.store.peft import export_peft

    refuse_taken(output, overwrite)
    program = choose(loader(directory))
    config = export_peft(program, output, overwrite=overwrite)
    modules = len(config.get("target_modules") or ())
    saved = f", and {', '.join(config['modules_to_save'])} whole" if config["modules_to_save"] else ""
    console().print(
        f"{config['peft_type']}{f' at {modules} modules' if modules else ''}{saved}; wrote {output}"
    )
