"""Commands for LoRA files of image models: import-lora, export-lora."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.options import loading_options, model_options, overwrite_option

if TYPE_CHECKING:
    from surgery.common.plugins import Plugins
    from surgery.engine.program import Program


@click.command("import-lora")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--base", "model", required=True, metavar="MODEL", help="Model of the file, such as diffusers:DIR."
)
@click.option("--as", "label", default="", metavar="NAME", help="Name of the adapter in the program.")
@overwrite_option
@loading_options
def import_(
    file: Path,
    model: str,
    output: Path,
    label: str,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Load a LoRA file of an image model onto one part of a pipeline, and save the result as a surgery directory.

    FILE is a .safetensors file with the keys of diffusers, PEFT or kohya's scripts. --part names the part: the UNet,
    the transformer or a text encoder.
    """
    from surgery.cli.render import console, trainable_line
    from surgery.common.files import refuse_taken
    from surgery.store.lora_files import import_lora, parts_in
    from surgery.store.lora_files.keys import MAIN, part_of

    refuse_taken(output, overwrite)
    parts = parts_in(file)
    base = loader(model)
    program = import_lora(file, base, label=label)
    program.save(output, overwrite=overwrite)
    out = console()
    for entry in program.journal.entries[len(base.journal) :]:
        if entry.kind == "rewrite":
            out.print(f"{entry.id}: {len(entry.sites)} sites")
    out.print(f"{trainable_line(program)}; wrote {output}")
    own = part_of(base)
    left = [part for part in parts if part != own and not (part == "main" and own in MAIN)]
    if left:
        out.print(f"the file also has factors for {', '.join(left)}: import them with --part")


@click.command("export-lora")
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY…")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write (.safetensors), or a directory for it.",
)
@click.option(
    "--format",
    "format_",
    # surgery.store.lora_files.FORMATS, which imports torch.
    type=click.Choice(["peft", "diffusers", "kohya"]),
    default="peft",
    show_default=True,
    help="Keys: as diffusers saves them today (peft), as its training scripts did (diffusers), or kohya's.",
)
@overwrite_option
@model_options
def export(
    directories: tuple[str, ...],
    output: Path,
    format_: str,
    overwrite: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Write the LoRAs of saved directories, each a part of one pipeline, as a file for `load_lora_weights`."""
    from surgery.cli.render import console
    from surgery.store.lora_files import export_lora
    from surgery.store.lora_files.writing import file_of

    programs = [loader(directory) for directory in directories]
    keys = export_lora(programs, output, format=format_, overwrite=overwrite)
    console().print(f"{len(keys)} tensors; wrote {file_of(output)}")
