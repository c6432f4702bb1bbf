"""Commands that export and compare: export, verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.options import json_option, model_options, with_adapters
from surgery.common.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.common.plugins import Plugins
    from surgery.engine.program import Program


@click.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="ONNX file to write; a directory with --generate or --adapters-as-inputs.",
)
@click.option(
    "--generate",
    is_flag=True,
    help="Export a language model for generation: prefill and decode graphs with a key-value cache.",
)
@click.option(
    "--adapters-as-inputs",
    is_flag=True,
    help="Make LoRA weights optional inputs of one model, and write a .onnx_adapter file for each adapter.",
)
@click.option("--opset", type=click.IntRange(18), help="ONNX opset (default: the exporter's).")
@click.option(
    "--external-data/--no-external-data",
    default=None,
    help="Store weights in a separate file (default: over 1.5 GB).",
)
@click.option("--seed", type=int, default=0, help="Seed of the random inputs of the parity check.")
@click.option("--overwrite", is_flag=True, help="Replace the contents of the output path.")
@json_option
@with_adapters
@model_options
def export(
    model: str,
    output: Path,
    generate: bool,
    adapters_as_inputs: bool,
    opset: int | None,
    external_data: bool | None,
    seed: int,
    overwrite: bool,
    as_json: bool,
    choose: Callable[[Program], Program],
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Write an ONNX file and check it in onnxruntime at a new input shape. Fails if the outputs do not agree."""
    from surgery.cli.reports import tell_adaptable, tell_exported, tell_generation
    from surgery.common.files import refuse_taken

    writes_directory = generate or adapters_as_inputs
    if writes_directory:
        refuse_taken(output, overwrite)
    elif output.exists() and not overwrite:
        raise SurgeryError(f"{output} exists; choose another -o, or pass --overwrite")
    elif output.is_dir():
        raise SurgeryError(f"{output} is a directory; name the ONNX file to write")
    if generate and external_data is not None:
        raise SurgeryError("--generate always stores weights in separate files; remove --external-data")
    program = choose(loader(model))
    if generate:
        made = program.export_generation(
            output, opset=opset, adapters_as_inputs=adapters_as_inputs, seed=seed, overwrite=overwrite
        )
        tell_generation(made, as_json)
        return
    if adapters_as_inputs:
        adaptable = program.export_adaptable(
            output, opset=opset, external_data=external_data, seed=seed, overwrite=overwrite
        )
        tell_adaptable(adaptable, as_json)
        return
    report = program.export(output, opset=opset, external_data=external_data, seed=seed)
    tell_exported(report, output, as_json)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance", type=click.FloatRange(0), help="Largest difference, relative to the scale of the output."
)
@click.option("--seed", type=int, default=0, help="Seed of the random inputs.")
@json_option
@model_options
@click.pass_context
def verify(
    ctx: click.Context,
    a: str,
    b: str,
    tolerance: float | None,
    seed: int,
    as_json: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Compare the outputs of A and B: model references, saved directories or ONNX files. Exit code 1 if they differ."""
    from surgery.cli.reports import tell_verified
    from surgery.export.verify import open_side
    from surgery.export.verify import verify as compare

    result = compare(open_side(a, loader), open_side(b, loader), tolerance=tolerance, seed=seed)
    tell_verified(result, as_json)
    if not result.agree:
        ctx.exit(1)
