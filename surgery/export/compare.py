"""Search for the first node at which two programs, or a program and its ONNX file, differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.capture.devices import HOME, device_of, on_device
from surgery.common.errors import ExportError
from surgery.export.parity import difference, scale_of, tolerance_of
from surgery.export.runtime import OnnxModel
from surgery.export.source import ExportSource, InputSet, module_path
from surgery.graph.graphs import flat_inputs

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Divergence:
    """The first node, in the order of the first model, whose values differ.

    Attributes:
        node: name of the node in the first model.
        other: name of its counterpart in the second model.
        module_path: path of the module that the node was traced in; "" if unknown.
        op: the op of the node.
        max_abs: largest absolute difference.
        relative: largest difference as a fraction of the value's scale.
    """

    node: str
    other: str
    module_path: str
    op: str
    max_abs: float
    relative: float


@dataclass(frozen=True)
class _Value:
    """The tensor that one node returned."""

    node: str
    module_path: str
    op: str
    tensor: torch.Tensor


def first_divergence(
    a: fx.GraphModule | OnnxModel,
    b: fx.GraphModule | OnnxModel,
    inputs: InputSet,
    tol: float | None = None,
) -> Divergence | None:
    """Find the first node whose values differ by more than `tol`.

    Nodes of two graphs are paired by module path, op and running number among the nodes with the same path and op.
    If a model is an ONNX file, nodes are paired by the name of the graph node, which the export writes into the file.
    ONNX nodes without that name are paired by the name of their output. Nodes without a counterpart are skipped.

    Args:
        a: a graph or an ONNX file.
        b: the graph or ONNX file to compare with.
        inputs: (args, kwargs) of the program. For two ONNX files, pass all inputs in kwargs by input name, because no
            program names positional inputs.
        tol: allowed difference as a fraction of the value's scale; None uses the parity tolerance of the dtype.

    Returns:
        The first differing node, or None if all paired nodes agree.

    Raises:
        ExportError: no nodes could be paired.
    """
    by_origin = isinstance(a, OnnxModel) or isinstance(b, OnnxModel)
    named = _named_inputs(a, b, inputs)
    left, right = _values(a, inputs, named, by_origin), _values(b, inputs, named, by_origin)
    pairs = [(value, right[key]) for key, value in left.items() if key in right]
    if not pairs:
        raise ExportError(
            "the two models have no node in common; compare a program with its own export or an edited version"
        )
    for first, second in pairs:
        gap = difference(first.tensor, second.tensor)
        relative = gap / scale_of(first.tensor)
        if relative > (tolerance_of(first.tensor.dtype) if tol is None else tol):
            return Divergence(
                first.node, second.node, first.module_path or second.module_path, first.op, gap, relative
            )
    return None


def _named_inputs(a: Any, b: Any, inputs: InputSet) -> dict[str, torch.Tensor]:
    args, kwargs = inputs
    program = next((each for each in (a, b) if isinstance(each, fx.GraphModule)), None)
    if program is not None:
        return ExportSource(program).named_inputs(args, kwargs)
    return {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}


def _values(
    program: fx.GraphModule | OnnxModel,
    inputs: InputSet,
    named: Mapping[str, torch.Tensor],
    by_origin: bool,
) -> dict[Key, _Value]:
    """Run a model and return its values by pairing key; `by_origin` pairs by the name of the graph node."""
    if isinstance(program, OnnxModel):
        return _onnx_values(program, named)
    recorder = _Recorder(program)
    with torch.no_grad():
        recorder.record(inputs)
    seen: Counter[Key] = Counter()
    found: dict[Key, _Value] = {}
    for node, tensor in recorder.values:
        op = str(node.target)
        place = (module_path(node), op)
        key: Key = (node.name,) if by_origin else (*place, seen[place])
        seen[place] += 1
        found[key] = _Value(node.name, *place, tensor)
    return found


def _onnx_values(model: OnnxModel, named: Mapping[str, torch.Tensor]) -> dict[Key, _Value]:
    # An op may become several ONNX nodes, and only the last one has its value. A file that surgery did not write has
    # no such marks, so all its nodes are used.
    nodes = [node for node in model.nodes if node.is_value] or list(model.nodes)
    tensors = model.intermediate([node.outputs[0] for node in nodes], named)
    return {
        (node.origin or node.outputs[0],): _Value(
            node.name, node.module_path, node.op, tensors[node.outputs[0]]
        )
        for node in nodes
    }


class _Recorder(fx.Interpreter):
    """Interpreter that copies every tensor an op returns, because a later op may write to it in place."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.values: list[tuple[fx.Node, torch.Tensor]] = []

    def record(self, inputs: InputSet) -> None:
        values = flat_inputs(self.module, *on_device(tuple(inputs), device_of(self.module)))
        self.run(*values, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, torch.Tensor):
            self.values.append((n, value.detach().to(HOME, copy=True)))
        return value
