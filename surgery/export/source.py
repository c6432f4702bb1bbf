"""What is exported: a flat ATen graph with its example inputs, and the names of what goes in and out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from surgery.common.errors import ExportError
from surgery.export import metadata_keys

InputSet = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class ExportSource:
    """A program to export.

    graph_module: flat, over ATen ops, from `torch.export.export(...).module(check_guards=False)`, and edited.
    dynamic_shapes: as `torch.export.export` takes it; the names of its Dims become the names of ONNX axes.
    rounding: ops of the graph that round their first argument, an activation, to a few steps.
    output_names: one for each tensor that the graph returns, in pytree order; None takes them from the keys
        of what it returns (`logits`, `hidden_states.0`; a bare tensor is `output`, a tuple `output_0`, …).
    """

    graph_module: fx.GraphModule
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    output_names: Sequence[str] | None = None
    rounding: frozenset[Any] = frozenset()

    def named_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of one call by the names of the ONNX inputs."""
        paths, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        placeholders = [node.name for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        named = {}
        for position, (path, leaf) in enumerate(paths):
            if isinstance(leaf, torch.Tensor):
                named[_input_name(path, position, placeholders)] = leaf
        return named

    def named_outputs(self, value: Any) -> dict[str, torch.Tensor]:
        """The tensors of what the graph returned by the names of the ONNX outputs.

        Raises ExportError where `output_names` has another length.
        """
        found = _key_names(value)
        if self.output_names is None:
            return found
        if len(self.output_names) != len(found):
            raise ExportError(
                f"{len(self.output_names)} output names were given, but the program returns "
                f"{len(found)} tensors ({', '.join(found)}): give one name for each"
            )
        return dict(zip(self.output_names, found.values(), strict=True))

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The program's outputs by name, computed by PyTorch without gradients."""
        with torch.no_grad():
            return self.named_outputs(self.graph_module(*args, **kwargs))


def _input_name(path: Sequence[Any], position: int, placeholders: Sequence[str]) -> str:
    """A keyword's own name (a container's leaves: `name.0`), a positional leaf's placeholder."""
    if path[0].idx == 1:
        return _join(path[1:])
    return placeholders[position] if position < len(placeholders) else f"input_{position}"


def _key_names(value: Any) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {"output": value}
    paths, _ = pytree.tree_flatten_with_path(value)
    named = {}
    for path, leaf in paths:
        if isinstance(leaf, torch.Tensor):
            name = _join(path)
            named[name if not name[0].isdigit() else f"output_{name}"] = leaf
    return named


def _join(path: Iterable[Any]) -> str:
    parts = []
    for key in path:
        part = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        parts.append(str(part))
    return ".".join(parts)


def axis_names(dynamic_shapes: Any) -> Any:
    """`dynamic_shapes` with every Dim replaced by its name and every static dimension left out.

    `torch.onnx.export` names axes only from strings; from Dims it writes its own symbols (`s43`).
    """
    if isinstance(dynamic_shapes, Mapping):
        return {key: axis_names(value) for key, value in dynamic_shapes.items()}
    if isinstance(dynamic_shapes, tuple | list):
        return type(dynamic_shapes)(axis_names(value) for value in dynamic_shapes)
    if isinstance(dynamic_shapes, str):
        return dynamic_shapes
    return dynamic_shapes.__name__ if isinstance(dynamic_shapes, type(torch.export.Dim("d"))) else None


def tagged_copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule over the same tensors whose nodes carry their own name in `meta["custom"]`.

    Tracing again renumbers nodes (`linear_1` becomes `linear_3` once a LoRA stands before it), so an ONNX
    name alone would point at the wrong node of the program.
    """
    graph = copy.deepcopy(graph_module.graph)
    for node in graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), metadata_keys.FX_NODE: node.name}
    return fx.GraphModule(graph_module, graph)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node was traced in; empty where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple) and entry]
    return str(paths[-1]) if paths else ""
