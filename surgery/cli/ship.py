"""Commands that ship and prove: export, verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from surgery.cli.options import json_option, model_options, with_adapters
from surgery.cli.render import console
from surgery.common.errors import SurgeryError
from surgery.common.files import refuse_taken
from surgery.common.plugins import Plugins
from surgery.engine.program import Program

if TYPE_CHECKING:
    from surgery.export.adaptable import AdaptableReport
    from surgery.export.generation import GenerationReport
    from surgery.export.onnx_file import ExportReport


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
    help="A language model for generation: prefill and decode with a cache of keys and values.",
)
@click.option(
    "--adapters-as-inputs",
    is_flag=True,
    help="LoRA as optional inputs of one model, and a .onnx_adapter file for each adapter.",
)
@click.option("--opset", type=click.IntRange(18), help="ONNX opset (default: the exporter's).")
@click.option(
    "--external-data/--no-external-data", default=None, help="Weights beside the file (default: over 1.5 GB)."
)
@click.option("--seed", type=int, default=0, help="For the fresh inputs of the parity check.")
@click.option("--overwrite", is_flag=True, help="Replace what is at the output path.")
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
    """Write ONNX, checked in onnxruntime at a new shape; fails where the outputs do not agree."""
    whole = generate or adapters_as_inputs
    if whole:
        refuse_taken(output, overwrite)
    elif output.exists() and not overwrite:
        raise SurgeryError(f"{output} exists; choose another -o, or pass --overwrite")
    elif output.is_dir():
        raise SurgeryError(f"{output} is a directory; name the ONNX file to write")
    if generate and external_data is not None:
        raise SurgeryError("--generate writes the weights beside the graphs; leave out --external-data")
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


def tell_exported(report: ExportReport, output: Path, as_json: bool) -> None:
    parity = report.parity
    if as_json:
        click.echo(
            json.dumps(
                {
                    "path": str(output),
                    "bytes": report.size,
                    "opset": report.opset,
                    "nodes": report.nodes,
                    "inputs": {k: list(v) for k, v in report.inputs.items()},
                    "outputs": {k: list(v) for k, v in report.outputs.items()},
                    "parity": parity.error if parity else None,
                    "parity_optimised": parity.optimised_error if parity else None,
                }
            )
        )
        return
    out = console()
    ends = ", ".join(f"{name}[{', '.join(map(str, shape))}]" for name, shape in report.inputs.items())
    out.print(Text(f"{ends} → {', '.join(report.outputs)}"))
    if parity:
        out.print(
            f"parity in onnxruntime: within {parity.error:.1e} of the outputs' scale as written, "
            f"{parity.optimised_error:.1e} optimised"
        )
    out.print(f"wrote {output}: {report.size / 1e6:.1f} MB, {report.nodes} nodes, opset {report.opset}")


def tell_generation(made: GenerationReport, as_json: bool) -> None:
    if as_json:
        plain = {
            **vars(made),
            "path": str(made.path),
            "adapters": {k: str(v) for k, v in made.adapters.items()},
        }
        click.echo(json.dumps(plain))
        return
    out = console()
    out.print(Text(f"decode: {', '.join(made.inputs['decode'][:4])}, … → logits and the longer cache"))
    out.print(
        f"onnxruntime generates as the model does: {made.tokens} greedy and {made.sampled} sampled tokens equal; "
        f"logits within {made.error:.1e} of their scale"
    )
    if made.ties:
        out.print(f"{made.ties} rows parted at a tie, where the logits are equal within rounding")
    for name, file in made.adapters.items():
        out.print(f"adapter {name}: {file} ({file.stat().st_size / 1e3:,.0f} kB), checked by itself")
    nodes = ", ".join(f"{part}.onnx {count} nodes" for part, count in made.nodes.items())
    out.print(f"wrote {made.path}/: {made.size / 1e6:.1f} MB, {nodes}, opset {made.opset}")


def tell_adaptable(made: AdaptableReport, as_json: bool) -> None:
    model = made.model
    if as_json:
        adapters = {
            name: {"path": str(file), "bytes": file.stat().st_size, "parity": made.errors[name]}
            for name, file in made.adapters.items()
        }
        parity = model.parity.error if model.parity else None
        click.echo(
            json.dumps({"path": str(made.path), "bytes": model.size, "parity": parity, "adapters": adapters})
        )
        return
    out = console()
    for name, file in made.adapters.items():
        out.print(
            f"adapter {name}: {file} ({file.stat().st_size / 1e3:,.0f} kB); active in onnxruntime, within "
            f"{made.errors[name]:.1e} of the outputs' scale"
        )
    if model.parity:
        out.print(f"with none, the base: within {model.parity.error:.1e}")
    out.print(
        f"wrote {made.path}/: model.onnx {model.size / 1e6:.1f} MB, {model.nodes} nodes, opset {model.opset}"
    )


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--tolerance", type=click.FloatRange(0), help="Largest difference over the output's scale.")
@click.option("--seed", type=int, default=0, help="For the fresh inputs.")
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
    """Compare two of: model reference, saved directory, ONNX file. Exit code 1 where they differ."""
    from surgery.export.verify import open_side
    from surgery.export.verify import verify as compare

    result = compare(open_side(a, loader), open_side(b, loader), tolerance=tolerance, seed=seed)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "agree": result.agree,
                    "tolerance": result.tolerance,
                    "outputs": [vars(o) for o in result.outputs],
                    "divergence": vars(result.divergence) if result.divergence else None,
                    "cause": result.cause,
                }
            )
        )
    else:
        out = console()
        for o in result.outputs:
            close = "within" if o.difference <= result.tolerance else "off by"
            how = "equal bit for bit" if o.equal else f"{close} {o.difference:.1e} of its scale"
            out.print(f"{o.name} {'×'.join(map(str, o.shape))}: {how}")
        out.print(
            Text("agree", style="green") if result.agree else Text("differ", style="red"),
            f"(tolerance {result.tolerance:.0e})",
        )
        if result.divergence:
            d = result.divergence
            where = f" in {d.module_path}" if d.module_path else ""
            after = f", after {result.cause}" if result.cause else ""
            out.print(
                f"first diverging node: {d.node} ({d.op}){where}, by {d.relative:.1e} of its scale{after}"
            )
    if not result.agree:
        ctx.exit(1)


COMMANDS = [export, verify]
