"""ONNX export of a Program: provenance from its journal, and a parity check at a new shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from surgery.capture import fresh_inputs, other_sizes
from surgery.capture.devices import HOME
from surgery.capture.normalization import normalization_of
from surgery.common.errors import ExportError
from surgery.engine.contract.base import RewritePass
from surgery.engine.registry import lowerings as known_lowerings
from surgery.engine.replay import live_entries, pass_of
from surgery.export.onnx_file import ExportReport, export_onnx
from surgery.export.ranges import ranges_of
from surgery.export.source import ExportSource, InputSet, module_path
from surgery.graph.graphs import live_nodes
from surgery.store.provenance import origin_of

if TYPE_CHECKING:
    from surgery.engine.program import Program


_RANDOM = frozenset(
    [
        "bernoulli",
        "cauchy",
        "exponential",
        "geometric",
        "log_normal",
        "multinomial",
        "normal",
        "normal_functional",
        "poisson",
        "rand",
        "randint",
        "randn",
        "randperm",
        "random",
        "uniform",
    ]
)


def source_of(program: Program) -> ExportSource:
    """ExportSource of the program's eval graph, with its example inputs and rounding ops."""
    args, kwargs = program.example_inputs
    passes = [pass_of(entry, program.base.plugins) for entry in live_entries(program.journal)]
    rounding = frozenset(
        op for pass_ in passes if isinstance(pass_, RewritePass) for op in pass_.effect.rounding
    )
    return ExportSource(
        program.graph_module, args, kwargs, program.captured.dynamic_shapes, rounding=rounding
    )


def provenance_of(program: Program) -> dict[str, dict[str, Any]]:
    """Pass, name and site of each tensor that a pass created or merged into, by tensor name.

    Tensors of adapters must not be folded. Weights changed by a merge have "pinned": False and may be stored
    transposed. Tensors that no output depends on are omitted, for example a shared weight after each layer was given
    its own copy.
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
    """Random input sets for the parity check.

    One set has the example's shape. If there are dynamic dimensions, a second set has another size of each.
    """
    captured = program.captured
    sets: list[InputSet] = [fresh_inputs(captured, None, seed)]
    other = other_sizes(captured)
    if other:
        sets.append(fresh_inputs(captured, other, seed + 1))
    return sets


def reaching_inputs(program: Program, sets: Sequence[InputSet]) -> list[InputSet]:
    """Modify input sets so that they exercise the ops that passes inserted, for example with new tokens.

    Returns:
        Only the sets that a pass changed.
    """
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    found: list[InputSet] = []
    for args, kwargs in sets:
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        given = {n: leaf for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)}
        changed = given
        for entry in live_entries(program.journal):
            reach = pass_of(entry, program.base.plugins).expectations.reach
            for record in entry.sites if reach is not None else ():
                site = program.sites.by_key.get(record.key)
                if reach is not None and site is not None:
                    changed = reach(site.deciding(record.decided), changed)
        # A pass returns the same tensor objects for inputs that it does not change.
        if any(changed[name] is not value for name, value in given.items()):
            fresh = [changed.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
            found.append(pytree.tree_unflatten(fresh, spec))
    return found


def cpu_of(program: Program) -> str:
    """The processors that the program's quantized weights were encoded for: "vnni" if a pass says so, else "any"."""
    passes = [pass_of(entry, program.base.plugins) for entry in live_entries(program.journal)]
    return "vnni" if any(getattr(pass_, "cpu", "any") == "vnni" for pass_ in passes) else "any"


def _draws(node: fx.Node) -> bool:
    """True if a node draws random numbers in eval mode."""
    name = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")[2]
    return name.removesuffix("_").removesuffix("_like") in _RANDOM


def _only_cast(node: fx.Node) -> bool:
    """True if a node is only read by casts to another dtype, which onnxruntime has for every dtype."""
    casts = ("aten::to", "aten::_to_copy", "aten::type_as")
    return all(
        getattr(getattr(user.target, "_schema", None), "name", "") in casts
        and getattr(user.meta.get("val"), "dtype", torch.bfloat16) != torch.bfloat16
        for user in node.users
    )


def check_written(program: Program) -> None:
    """Check that no pass inserted an op that has no ONNX form, and that onnxruntime's CPU has the program's dtype.

    Raises:
        ExportError: the graph contains such an op, draws random numbers, or reads bfloat16.
    """
    found = live_nodes(program.graph)
    nodes = [node for node in program.graph.nodes if node in found]
    tensors = {**program.base.tensors, **program.tensors}
    for node in nodes:
        value = tensors.get(str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        if (
            node.op in ("get_attr", "placeholder")
            and getattr(value, "dtype", None) == torch.bfloat16
            and not _only_cast(node)
        ):
            raise ExportError(
                f"{node.target} is bfloat16, in which onnxruntime's CPU cannot compute; export with --dtype float32 "
                '(surgery.load(…, dtype="float32")), or convert the module'
            )
        if _draws(node):
            raise ExportError(
                f"{node.target} at node '{node.name}' ({module_path(node) or 'forward'}) draws random numbers, so the "
                "file could not be compared with the program; make the noise an input"
            )
    live = {node.target for node in nodes}
    for entry in live_entries(program.journal):
        for op, why in pass_of(entry, program.base.plugins).expectations.no_onnx.items():
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
    cpu: str | None = None,
    data: Sequence[InputSet] = (),
    tolerance: float | None = None,
    only: str | None = None,
) -> ExportReport:
    """Export a program to ONNX, and compare onnxruntime with the program on random inputs at two shapes.

    A program on another device is copied to the CPU first.

    Args:
        program: the program; its weights must be in memory.
        path: the file to write; an existing file is replaced only if the export succeeds.
        opset: ONNX opset; None uses torch's default, or a later one if an op of the graph needs it.
        external_data: True stores the weights in `<path>.data`; None does so above 1.5 GB.
        seed: seed of the inputs for the parity check.
        lowerings: additional onnxscript functions by torch op.
        optional: tensors of passes that become optional inputs; see `export_adaptable`.
        cpu: "any" refuses integer products that saturate on processors without VNNI; "vnni" allows them; None follows
            the option of the passes that quantized.
        data: inputs on which rounded activations are judged (surgery.export.rounded_parity); random ones if empty.
        tolerance: how much rounded activations may change beyond twice the program's own rounding.
        only: name of the one output to write, with what it depends on; None writes all outputs.

    Raises:
        ExportError: the export or the parity check fails.
        MissingExtraError: the onnx extra is not installed.
    """
    if not program.base.in_memory:
        raise ExportError(
            "the weights are not in memory, so there is nothing to export; load the weights first"
        )
    if program.base.consumed and program.journal.merged:
        raise ExportError("the base was merged in place; load the saved directory again")
    program = program.to(HOME)
    check_written(program)
    parity = parity_inputs(program, seed)
    parity += reaching_inputs(program, parity[:1])
    # A few values of one seed are not enough to measure the size of rounding errors.
    judged = list(data) or [*parity, *parity_inputs(program, seed + 2)]
    source, provenance = source_of(program), provenance_of(program)
    if only is not None:
        source = source.up_to(only)
        read = {str(node.target) for node in source.graph_module.graph.nodes if node.op == "get_attr"}
        provenance = {name: facts for name, facts in provenance.items() if name in read}
    return export_onnx(
        source,
        Path(path),
        opset=opset,
        provenance=provenance,
        journal_json=json.dumps(program.journal.to_json()),
        labels=program.labels,
        base_json=origin_of(program.base).model_dump_json(),
        pixels=normalization_of(program.base.loaded),
        ranges=ranges_of(program.captured),
        lowerings={**known_lowerings(program.base.plugins), **(lowerings or {})},
        external_data=external_data,
        parity=parity,
        optional=optional,
        cpu=cpu or cpu_of(program),
        judged=judged,
        given=bool(data),
        tolerance=tolerance,
    )
