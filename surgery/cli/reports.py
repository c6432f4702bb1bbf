"""Reports of finished commands: applied passes, merges, exports, comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from surgery.cli.render import choices_table, console
from surgery.common.quantities import count, in_bytes
from surgery.engine.contract.selection import in_words
from surgery.engine.journal import Entry
from surgery.engine.program import Program

if TYPE_CHECKING:
    from surgery.export.adaptable import AdaptableReport
    from surgery.export.generation import GenerationReport
    from surgery.export.onnx_file import ExportReport
    from surgery.export.verify import Verification


def tell_applied(out: Console, before: Program, result: Program) -> None:
    """Print a line for each applied pass, including a freeze that the pipeline added.

    Args:
        out: console.
        before: program before the passes.
        result: program after them.
    """
    if before.journal.merged and not result.journal.merged:
        gone = [e.id for e in before.journal if e.kind == "merge"]
        out.print(f"the merged weights are the base now: {', '.join(gone)} can no longer be undone there")
    for report in result.reports[len(before.reports) :]:
        entry, planned = report.entry, report.plan
        line = Text(f"{entry.id}: ", style="bold")
        if entry.kind == "rewrite":
            line.append(f"{len(entry.sites)} sites, {count(planned.parameters)} parameters; outputs ")
            line.append(report.outcome)
            if entry.trains:
                line.append(f"; of the base {in_words(entry, result.tensors)}")
        else:
            line.append(in_words(entry, result.tensors) + (" (added by the pipeline)" if entry.auto else ""))
        out.print(line)
        for row in planned.refused:
            out.print(Text(f"  refused {row.site.path}: {row.refusal}", style="yellow"))
        for sentence in planned.notes:
            out.print(Text(f"  note: {sentence}", style="yellow"))


def tell_merged(out: Console, merged: Program, entry: Entry | None) -> None:
    """Print the result of a merge.

    Args:
        out: console.
        merged: merged program.
        entry: journal entry of the merge, None if there was nothing to merge.
    """
    if entry is None:
        out.print("no adapter to fold; the weights of the base are kept as trained")
        return
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


def tell_exported(report: ExportReport, output: Path, as_json: bool) -> None:
    """Print the report of an ONNX export."""
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
                    "rounding": parity.rounding.to_json() if parity and parity.rounding else None,
                }
            )
        )
        return
    out = console()
    ends = ", ".join(f"{name}[{', '.join(map(str, shape))}]" for name, shape in report.inputs.items())
    out.print(Text(f"{ends} → {', '.join(report.outputs)}"))
    if parity and parity.rounding:
        rounding = parity.rounding
        without = "" if rounding.runtime else " without the rounding of activations"
        out.print(
            f"parity in onnxruntime: within {parity.error:.1e} of the outputs' scale as written{without}"
        )
        out.print(rounding.said)
        if rounding.runtime:
            out.print("to keep activations in float: session.qdq_matmulnbits_accuracy_level = 1")
    elif parity:
        out.print(
            f"parity in onnxruntime: within {parity.error:.1e} of the outputs' scale as written, "
            f"{parity.optimised_error:.1e} optimised"
        )
    out.print(f"wrote {output}: {in_bytes(report.size)}, {report.nodes} nodes, opset {report.opset}")


def tell_generation(made: GenerationReport, as_json: bool) -> None:
    """Print the report of an export for generation."""
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
        out.print(f"{made.ties} rows diverged at a tie, where the logits are equal within rounding")
    for name, file in made.adapters.items():
        out.print(f"adapter {name}: {file} ({in_bytes(file.stat().st_size)}), checked by itself")
    nodes = ", ".join(f"{part}.onnx {count} nodes" for part, count in made.nodes.items())
    out.print(f"wrote {made.path}/: {in_bytes(made.size)}, {nodes}, opset {made.opset}")


def tell_adaptable(made: AdaptableReport, as_json: bool) -> None:
    """Print the report of an export with adapters as inputs."""
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
            f"adapter {name}: {file} ({in_bytes(file.stat().st_size)}); active in onnxruntime, within "
            f"{made.errors[name]:.1e} of the outputs' scale"
        )
    if model.parity:
        out.print(f"without adapters, the base: within {model.parity.error:.1e}")
    out.print(
        f"wrote {made.path}/: model.onnx {in_bytes(model.size)}, {model.nodes} nodes, opset {model.opset}"
    )


def tell_verified(result: Verification, as_json: bool) -> None:
    """Print a comparison of two programs or files."""
    if as_json:
        click.echo(
            json.dumps(
                {
                    "agree": result.agree,
                    "tolerance": result.tolerance,
                    "outputs": [vars(o) for o in result.outputs],
                    "divergence": vars(result.divergence) if result.divergence else None,
                    "cause": result.cause,
                    "rounding": result.rounding.to_json() if result.rounding else None,
                }
            )
        )
        return
    out = console()
    if result.rounding:
        out.print(
            Text("agree: " if result.agree else "differ: ", style="green" if result.agree else "red"), end=""
        )
        out.print(result.rounding.said)
        if result.plain:
            worst = result.plain.worst
            out.print(
                f"without that rounding: within {worst.judged:.1e} of the scale of '{worst.name}' "
                f"(allowed {worst.tolerance:.0e})"
            )
    for o in result.outputs if not result.rounding else ():
        close = "within" if o.difference <= result.tolerance else "off by"
        how = "equal bit for bit" if o.equal else f"{close} {o.difference:.1e} of its scale"
        out.print(f"{o.name} {'×'.join(map(str, o.shape))}: {how}")
    if not result.rounding:
        out.print(
            Text("agree", style="green") if result.agree else Text("differ", style="red"),
            f"(tolerance {result.tolerance:.0e})",
        )
    if result.divergence:
        d = result.divergence
        where = f" in {d.module_path}" if d.module_path else ""
        after = f", after {result.cause}" if result.cause else ""
        out.print(f"first diverging node: {d.node} ({d.op}){where}, by {d.relative:.1e} of its scale{after}")
