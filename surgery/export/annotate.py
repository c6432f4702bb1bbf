"""Ties, names and provenance on an onnx_ir model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from surgery.common.errors import ExportError
from surgery.engine.module import memory_of
from surgery.export import metadata_keys
from surgery.export.source import module_path

Provenance = Mapping[str, Mapping[str, Any]]


def tie_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Store a tensor that has several names once; returns each dropped name with the one that was kept.

    Tensors are tied where they are the same memory, never where they are merely equal. Tracing often leaves
    one initializer for both names already, under either of them.
    """
    kept: dict[tuple[Any, ...], str] = {}
    dropped: dict[str, str] = {}
    initializers = model.graph.initializers
    present = [name for name in initializers if name in tensors]
    for name in [*present, *(name for name in tensors if name not in initializers)]:
        tensor = tensors[name]
        if tensor.numel() == 0:
            continue
        same = memory_of(tensor)
        if name not in initializers:
            if same in kept:
                dropped[name] = kept[same]
            continue
        first = kept.setdefault(same, name)
        if first != name:
            initializers[name].replace_all_uses_with(initializers[first])
            del initializers[name]
            dropped[name] = first
    return dropped


def note_ties(model: Any, names: Mapping[str, torch.Tensor], stored: Mapping[str, str]) -> None:
    """Write on each initializer the other names of its tensor.

    names: every name that the program has for a tensor, used by the graph or not.
    stored: parameter name to the initializer that holds it.
    """
    holders: dict[tuple[int, int], str] = {}
    for name, initializer in stored.items():
        tensor = names.get(name)
        if tensor is not None and tensor.numel():
            holders.setdefault((tensor.data_ptr(), tensor.numel()), initializer)
    others: dict[str, list[str]] = {}
    for name, tensor in names.items():
        holder = holders.get((tensor.data_ptr(), tensor.numel())) if tensor.numel() else None
        if holder is None or holder not in model.graph.initializers:
            continue
        source = model.graph.initializers[holder].metadata_props.get(metadata_keys.SOURCE, holder)
        if name != source:
            others.setdefault(holder, []).append(name)
    for holder, aliases in others.items():
        model.graph.initializers[holder].metadata_props[metadata_keys.TIED] = json.dumps(sorted(set(aliases)))


def tag_nodes(model: Any) -> None:
    """Write on each ONNX node the program's node and module that it came from.

    In place of what the exporter writes there: stack traces, with the names of this machine's files, which take more
    room than all else in a small model's file.
    Must run before any pass: a rewrite keeps metadata_props but not the graph node behind them.
    """
    last: dict[str, str] = {}
    for node in model.graph:
        traced = node.meta.get("node")
        custom = traced.meta.get("custom") or {} if traced is not None else {}
        if metadata_keys.FX_NODE in custom:
            last[custom[metadata_keys.FX_NODE]] = traced.name
    for node in model.graph:
        traced = node.meta.get("node")
        if traced is None:
            continue
        custom = traced.meta.get("custom") or {}
        node.metadata_props.clear()
        node.metadata_props[metadata_keys.MODULE] = module_path(traced)
        if origin := custom.get(metadata_keys.FX_NODE):
            node.metadata_props[metadata_keys.FX_NODE] = origin
            if last[origin] == traced.name and node.outputs[0].name == traced.name:
                node.metadata_props[metadata_keys.FX_OUTPUT] = origin
        if isinstance(custom.get(metadata_keys.CUSTOM), Mapping):
            node.metadata_props.update(_properties(custom[metadata_keys.CUSTOM]))


def write_provenance(model: Any, provenance: Provenance, stored: Mapping[str, str]) -> None:
    """Write pass, name and site on the tensors of `provenance` and on the nodes that compute with them.

    A node computes with a tensor where it reads it, or reads what was made from tensors alone (Bᵀ, B·A). What
    the graph itself said of a node, in `meta["custom"]`, stands.

    Raises ExportError where a tensor with provenance is not in the file: an optimisation lost it.
    """
    origin: dict[Any, Mapping[str, Any]] = {}
    for name, entry in provenance.items():
        if name not in stored:
            raise ExportError(
                f"tensor '{name}' of pass '{entry.get('pass', '?')}' did not reach the ONNX file: no output "
                "depends on it; remove the pass, or look for a later one that replaced its node"
            )
        value = model.graph.initializers[stored[name]]
        value.metadata_props.update(_properties(entry))
        origin[value] = entry
    for node in model.graph:
        entries = [origin[value] for value in node.inputs if value in origin]
        if not entries:
            continue
        if metadata_keys.PASS not in node.metadata_props:
            node.metadata_props.update(_properties(entries[0]))
        made = [value for value in node.inputs if value is not None]
        if all(value in origin or value.is_initializer() for value in made):
            origin.update(dict.fromkeys(node.outputs, entries[0]))


def _properties(entry: Mapping[str, Any]) -> dict[str, str]:
    known = {"pass": metadata_keys.PASS, "name": metadata_keys.NAME, "site": metadata_keys.SITE}
    return {key: str(entry[field]) for field, key in known.items() if field in entry}


def stored_names(model: Any, names: Iterable[str], tied: Mapping[str, str]) -> dict[str, str]:
    """For each tensor of the program that the file holds, the name of the initializer that holds it."""
    by_source = {
        value.metadata_props.get(metadata_keys.SOURCE, name): name
        for name, value in model.graph.initializers.items()
    }
    return {name: by_source[tied.get(name, name)] for name in names if tied.get(name, name) in by_source}


def rename_ends(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give the graph's inputs and outputs their names, moving aside inner values that have them.

    Raises ExportError where the counts differ or a name stands for two things.
    """
    graph = model.graph
    if len(inputs) != len(graph.inputs) or len(outputs) != len(graph.outputs):
        raise ExportError(
            f"the ONNX graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, where the "
            f"program has {len(inputs)} and {len(outputs)}: one that is not a tensor cannot be kept"
        )
    if double := sorted({name for name in [*inputs, *outputs] if [*inputs, *outputs].count(name) > 1}):
        raise ExportError(f"'{double[0]}' names two inputs or outputs: rename one with output_names")
    taken = {*inputs, *outputs}
    ends = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value.name in taken and value not in ends:
                value.name = f"{value.name}.inner"
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
