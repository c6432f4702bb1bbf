"""Tied weights, names and provenance of an onnx_ir model."""

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
    """Store a tensor with several names once.

    Tensors are tied if they share memory, not if they are merely equal. Tracing often leaves a single initializer for
    both names already, under either of them.

    Returns:
        Each dropped name with the name that was kept.
    """
    kept: dict[tuple[Any, ...], str] = {}
    dropped: dict[str, str] = {}
    initializers = model.graph.initializers
    # Process the names with an initializer first, so that every tensor keeps a name that exists in the file.
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
    """Record the other names of each tensor in the metadata of its initializer.

    Args:
        model: the onnx_ir model.
        names: tensors by every name in the program, whether the graph uses the name or not.
        stored: name of the initializer that stores each parameter, by parameter name.
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
    """Record in each ONNX node the graph node and the module it came from.

    This replaces the exporter's metadata: stack traces that contain local file names and take more space than
    everything else in the file of a small model. Call it before any optimization pass, because a rewrite keeps
    metadata_props but drops the reference to the graph node.
    """
    # One graph node may be decomposed into several traced nodes; the last of them computes its value.
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
    """Record pass, name and site on the tensors of `provenance` and on the nodes that use them.

    A node uses a tensor if it reads the tensor, or a value computed from tensors alone (Bᵀ, B·A). Provenance that
    the graph already recorded for a node in `meta["custom"]` is kept.

    Args:
        model: the onnx_ir model.
        provenance: {"pass", "name", "site"} of each tensor, by tensor name.
        stored: name of the initializer that stores each tensor, by tensor name.

    Raises:
        ExportError: a tensor with provenance is not in the file.
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
        # Pass the provenance on only while no activation is involved; otherwise it would reach the model's outputs.
        given = [value for value in node.inputs if value is not None]
        if all(value in origin or value.is_initializer() for value in given):
            origin.update(dict.fromkeys(node.outputs, entries[0]))


def _properties(entry: Mapping[str, Any]) -> dict[str, str]:
    known = {"pass": metadata_keys.PASS, "name": metadata_keys.NAME, "site": metadata_keys.SITE}
    return {key: str(entry[field]) for field, key in known.items() if field in entry}


def stored_names(model: Any, names: Iterable[str], tied: Mapping[str, str]) -> dict[str, str]:
    """Map each of the program's tensor names to the initializer that stores it.

    Args:
        model: the onnx_ir model.
        names: tensor names of the program; names missing from the file are omitted.
        tied: dropped names with the names that were kept, from `tie_weights`.
    """
    by_source = {
        value.metadata_props.get(metadata_keys.SOURCE, name): name
        for name, value in model.graph.initializers.items()
    }
    return {name: by_source[tied.get(name, name)] for name in names if tied.get(name, name) in by_source}


def rename_ends(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Rename the inputs and outputs of the graph. An inner value with the same name gets the suffix `.inner`.

    Args:
        model: the onnx_ir model.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.

    Raises:
        ExportError: the counts differ, or a name occurs twice.
    """
    graph = model.graph
    if len(inputs) != len(graph.inputs) or len(outputs) != len(graph.outputs):
        raise ExportError(
            f"the ONNX graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, but the "
            f"program has {len(inputs)} and {len(outputs)}; make every input and output a tensor"
        )
    if double := sorted({name for name in [*inputs, *outputs] if [*inputs, *outputs].count(name) > 1}):
        raise ExportError(f"'{double[0]}' names two inputs or outputs; rename one with output_names")
    taken = {*inputs, *outputs}
    ends = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value.name in taken and value not in ends:
                value.name = f"{value.name}.inner"
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
