"""Input of the ONNX export: a flat ATen graph with example inputs, and the names of its inputs and outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from surgery.capture.devices import HOME, device_of, on_device
from surgery.common.errors import ExportError
from surgery.export import metadata_keys
from surgery.graph.compiled import compiled
from surgery.graph.graphs import copy_graph
from surgery.graph.outputs import named_outputs

_SQUEEZES = (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims)

InputSet = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class ExportSource:
    """A program to export.

    Attributes:
        graph_module: flat graph of ATen ops, from `torch.export.export(...).module(check_guards=False)`, possibly
            edited.
        args: positional example inputs.
        kwargs: example inputs by name.
        dynamic_shapes: dynamic dimensions as `torch.export.export` takes them. The names of the Dims become the names
            of the ONNX axes.
        output_names: one name for each returned tensor, in pytree order. None derives the names from the keys of the
            returned value: `logits`, `hidden_states.0`, `output` for a single tensor, `output_0` for a tuple entry, and
            `out_sample` if an input is named `sample`.
        rounding: ops of the graph that round their first argument, an activation, to a few levels.
    """

    graph_module: fx.GraphModule
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    output_names: Sequence[str] | None = None
    rounding: frozenset[Any] = frozenset()

    def up_to(self, output: str) -> ExportSource:
        """The source with one of its outputs alone, without the nodes that no longer matter.

        Args:
            output: name of the output.
        """
        graph = copy_graph(self.graph_module.graph)
        node = named_outputs(graph)[output]
        leaves, spec = pytree.tree_flatten({output: node})
        graph.output_node().args = (tuple(leaves),)
        codegen: Any = graph._codegen
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
        graph.eliminate_dead_code(lambda each: each.op == "placeholder" or each.is_impure())
        short = compiled(self.graph_module, graph, type(self.graph_module).__name__)
        short.meta = dict(self.graph_module.meta)
        return replace(self, graph_module=short)

    def named_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Tensors of one call, by the names of the ONNX inputs."""
        paths, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        placeholders = [node.name for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        named = {}
        for position, (path, leaf) in enumerate(paths):
            if isinstance(leaf, torch.Tensor):
                named[_input_name(path, position, placeholders)] = leaf
        return named

    def named_outputs(self, value: Any) -> dict[str, torch.Tensor]:
        """Tensors of the graph's return value, by the names of the ONNX outputs.

        Raises:
            ExportError: the number of `output_names` differs from the number of tensors.
        """
        found = _key_names(value)
        if self.output_names is None:
            # A file has one name for each tensor; UNets and VAEs of diffusers take a `sample` and return one.
            taken = set(self.named_inputs(self.args, self.kwargs))
            return {f"out_{name}" if name in taken else name: tensor for name, tensor in found.items()}
        if len(self.output_names) != len(found):
            raise ExportError(
                f"{len(self.output_names)} output names were given, but the program returns "
                f"{len(found)} tensors ({', '.join(found)}); give one name for each tensor"
            )
        return dict(zip(self.output_names, found.values(), strict=True))

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run the program in PyTorch, on its device and without gradients; return its outputs by name, on the CPU."""
        args, kwargs = on_device((tuple(args), dict(kwargs)), device_of(self.graph_module))
        with torch.no_grad():
            return self.named_outputs(on_device(self.graph_module(*args, **kwargs), HOME))


def _input_name(path: Sequence[Any], position: int, placeholders: Sequence[str]) -> str:
    """Name of one input leaf: the keyword (`name.0` inside a container), or the placeholder of a positional input."""
    if path[0].idx == 1:
        return _join(path[1:])
    return placeholders[position] if position < len(placeholders) else f"input_{position}"


def _key_names(value: Any) -> dict[str, torch.Tensor]:
    """Tensors of a nested value by their keys, such as `hidden_states.0`."""
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
    """Join the keys of a pytree path with dots."""
    parts = []
    for key in path:
        part = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        parts.append(str(part))
    return ".".join(parts)


def tagged_copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Copy of a graph module that shares the tensors and records each node's name in `meta["custom"]`.

    Tracing the graph again renumbers its nodes: `linear_1` becomes `linear_3` if a LoRA comes before it. The name of
    an ONNX node alone could therefore refer to the wrong node of the program.
    """
    graph = copy.deepcopy(graph_module.graph)
    _drop_idle_squeezes(graph)
    for node in graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), metadata_keys.FX_NODE: node.name}
    return compiled(graph_module, graph)


def _drop_idle_squeezes(graph: fx.Graph) -> None:
    """Remove squeezes of an axis that is not 1. torch ignores these; the Squeeze of ONNX fails on them."""
    for node in list(graph.nodes):
        if node.target not in _SQUEEZES or not isinstance(node.args[0], fx.Node):
            continue
        before, after = (n.meta.get("val") for n in (node.args[0], node))
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.ndim == after.ndim:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was traced in; "" if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple) and entry]
    return str(paths[-1]) if paths else ""
