"""Commands that export and compare: export, verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import json_option, judged_option, model_options, with_adapters
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
    help="ONNX file to write; a directory with --generate, --adapters-as-inputs or --sentence-transformers.",
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
@click.option(
    "--sentence-transformers",
    is_flag=True,
    help='Write a directory that SentenceTransformer(DIR, backend="onnx") loads.',
)
@click.option("--opset", type=click.IntRange(18), help="ONNX opset (default: the exporter's).")
@click.option(
    "--external-data/--no-external-data",
    default=None,
    help="Store weights in a separate file (default: over 1.5 GB).",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    help="Convert the model and its adapters to this dtype (default: as stored; onnxruntime's CPU has no bfloat16).",
)
@click.option(
    "--cpu",
    type=click.Choice(["any", "vnni"]),
    help="Processors that int8 products must be correct on: any, or x86 with VNNI alone (default: as quantized).",
)
@judged_option
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="With rounded activations: share of the outputs' size and of the decisions that the file may change beyond "
    "twice the program's own rounding (default: 0.05; 0.1 where only onnxruntime rounds).",
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
    sentence_transformers: bool,
    opset: int | None,
    external_data: bool | None,
    dtype: str | None,
    cpu: str | None,
    data: tuple[Path, ...],
    tolerance: float | None,
    seed: int,
    overwrite: bool,
    as_json: bool,
    choose: Callable[[Program], Program],
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Write an ONNX file and check it in onnxruntime at a new input shape. Fails if the outputs do not agree."""
    from surgery.cli.loading import read_data
    from surgery.cli.reports import tell_adaptable, tell_exported, tell_generation
    from surgery.common.files import refuse_file, refuse_taken
    from surgery.export.adaptable import export_adaptable
    from surgery.export.generation import export_generation
    from surgery.export.program import export_program

    if sentence_transformers and (generate or adapters_as_inputs):
        raise SurgeryError(
            "--sentence-transformers writes one model for its library; remove --generate and --adapters-as-inputs"
        )
    writes_directory = generate or adapters_as_inputs or sentence_transformers
    if writes_directory:
        refuse_taken(output, overwrite)
    else:
        refuse_file(output, overwrite)
        if output.is_dir():
            raise SurgeryError(f"{output} is a directory; name the ONNX file to write")
    if generate and external_data is not None:
        raise SurgeryError("--generate always stores weights in separate files; remove --external-data")
    program = choose(loader(model, dtype=dtype))
    shared: dict[str, Any] = {
        "opset": opset,
        "cpu": cpu,
        "seed": seed,
        "data": read_data(program, data),
        "tolerance": tolerance,
    }
    if generate:
        made = export_generation(
            program, output, adapters_as_inputs=adapters_as_inputs, overwrite=overwrite, **shared
        )
        tell_generation(made, as_json)
        return
    if adapters_as_inputs:
        adaptable = export_adaptable(
            program, output, external_data=external_data, overwrite=overwrite, **shared
        )
        tell_adaptable(adaptable, as_json)
        return
    if sentence_transformers:
        from surgery.export.sentence import export_sentence

        report = export_sentence(program, output, external_data=external_data, overwrite=overwrite, **shared)
    else:
        report = export_program(program, output, external_data=external_data, **shared)
    tell_exported(report, output, as_json)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Largest difference, relative to the scale of the output; with rounded activations, as in export.",
)
@judged_option
@click.option("--seed", type=int, default=0, help="Seed of the random inputs.")
@json_option
@model_options
@click.pass_context
def verify(
    ctx: click.Context,
    a: str,
    b: str,
    tolerance: float | None,
    data: tuple[Path, ...],
    seed: int,
    as_json: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Compare the outputs of A and B: model references, saved directories or ONNX files. Exit code 1 if they differ."""
    from surgery.cli.loading import load_sides, read_data
    from surgery.cli.reports import tell_verified
    from surgery.engine.program import Program
    from surgery.export.verify import open_side
    from surgery.export.verify import verify as compare

    of_a, of_b = load_sides(loader, a, b)
    sides = open_side(a, of_a), open_side(b, of_b)
    program = next((side for side in sides if isinstance(side, Program)), None)
    if data and program is None:
        raise SurgeryError(
            "--data needs a model beside the ONNX file, to make its inputs; name the model as A or B"
        )
    given = read_data(program, data) if program is not None else []
    result = compare(*sides, tolerance=tolerance, seed=seed, data=given)
    tell_verified(result, as_json)
    if not result.agree:
        ctx.exit(1)
