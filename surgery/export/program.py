"""A program to ONNX: what its journal says becomes provenance, and parity is checked at a new shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from surgery.capture import fresh_inputs, other_sizes
from surgery.common.errors import ExportError
from surgery.engine.contract.base import RewritePass
from surgery.engine.replay import live_entries, pass_of
from surgery.export.onnx_file import ExportReport, export_onnx
from surgery.export.source import ExportSource, InputSet
from surgery.graph.graphs import live_nodes

if TYPE_CHECKING:
    from surgery.engine.program import Program


def source_of(program: Program) -> ExportSource:
    """The program's eval graph with its inputs."""
    args, kwargs = program.example_inputs
    passes = [pass_of(entry, program.base.plugins) for entry in live_entries(program.journal)]
    rounding = frozenset(op for pass_ in passes if isinstance(pass_, RewritePass) for op in pass_.rounding)
    return ExportSource(
        program.graph_module, args, kwargs, program.captured.dynamic_shapes, rounding=rounding
    )


def provenance_of(program: Program) -> dict[str, dict[str, Any]]:
    """Tensor name -> pass, name and site: adapters (which nothing may fold), and weights that a merge changed.

    What no output depends on is left out: the weight that layers shared before each was given a copy, say.
    """
    found: dict[str, dict[str, Any]] = {}
    read = {str(node.target) for node in live_nodes(program.graph) if node.op == "get_attr"}
    live = live_entries(program.journal)
    names = {n for e in program.journal if e.kind == "merge" for n in e.options.get("folded", ())}
    folded = [entry for entry in program.journal if entry.id in names]
    for entry in (*live, *folded):
        for record in entry.sites:
            place = {"pass": entry.pass_name, "name": entry.label or "default", "site": record.path}
            if entry.id not in names:
                found.update(dict.fromkeys((n for n in record.tensors.values() if n in read), place))
            elif record.key.owner in program.base.tensors:
                found[record.key.owner] = {**place, "pinned": False}
    return found


def parity_inputs(program: Program, seed: int = 0) -> list[InputSet]:
    """Two fresh sets of inputs: at the example's shape, and at another shape of every dynamic dimension."""
    captured = program.captured
    sets: list[InputSet] = [fresh_inputs(captured, None, seed)]
    other = other_sizes(captured)
    if other:
        sets.append(fresh_inputs(captured, other, seed + 1))
    return sets


def reaching_inputs(program: Program, sets: Sequence[InputSet]) -> list[InputSet]:
    """The sets of inputs that adapters want changed, so that what they inserted takes part (new tokens, say)."""
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    found: list[InputSet] = []
    for args, kwargs in sets:
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        given = {n: leaf for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)}
        changed = given
        for entry in live_entries(program.journal):
            pass_: Any = pass_of(entry, program.base.plugins)
            for record in entry.sites:
                site = program.sites.by_key.get(record.key)
                if site is not None:
                    changed = pass_.reaching(site.deciding(record.decided), changed)
        if any(changed[name] is not value for name, value in given.items()):
            fresh = [changed.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
            found.append(pytree.tree_unflatten(fresh, spec))
    return found


def check_written(program: Program) -> None:
    """Raises ExportError for a pass of which an op stands in the graph that has no form in ONNX."""
    live = {node.target for node in live_nodes(program.graph)}
    for entry in live_entries(program.journal):
        for op, why in getattr(pass_of(entry, program.base.plugins), "unwritten", {}).items():
            if op in live:
                raise ExportError(f"{entry.id}: {why}")


def export_program(
    program: Program,
    path: Any,
    *,
    opset: int | None = None,
    external_data: bool | None = None,
    seed: int = 0,
    lowerings: Mapping[Any, Any] | None = None,
    optional: Sequence[str] = (),
) -> ExportReport:
    """Export to ONNX, checked in onnxruntime against the program on fresh inputs at another shape.

    optional: tensors of passes that are left as optional inputs; see `export_adaptable`.
    Raises ExportError where parity fails (nothing is then left at `path`), MissingExtraError.
    """
    if not program.base.in_memory:
        raise ExportError("the weights are not in memory, so there is nothing to export")
    if program.base.consumed and program.journal.merged:
        raise ExportError("the base was merged in place; load the saved directory again")
    check_written(program)
    parity = parity_inputs(program, seed)
    parity += reaching_inputs(program, parity[:1])
    return export_onnx(
        source_of(program),
        Path(path),
        opset=opset,
        provenance=provenance_of(program),
        journal_json=json.dumps(program.journal.to_json()),
        lowerings={**program.base.plugins.lowerings, **(lowerings or {})},
        external_data=external_data,
        parity=parity,
        optional=optional,
    )
