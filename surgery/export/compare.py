"""Where two programs, or a program and its ONNX file, first stop agreeing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.common.errors import ExportError
from surgery.export.parity import difference, scale_of, tolerance_of
from surgery.export.runtime import OnnxModel
from surgery.export.source import ExportSource, InputSet, module_path
from surgery.graph.graphs import flat_inputs

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Divergence:
    """The first node, in the order of the first argument, whose values differ.

    node: its name in the first argument. other: its counterpart's in the second.
    max_abs: the largest difference. relative: the same as a fraction of the value's scale.
    """

    node: str
    other: str
    module_path: str
    op: str
    max_abs: float
    relative: float


@dataclass(frozen=True)
class _Value:
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
    """The first node whose values differ by more than `tol` of their scale; None where all agree.

    inputs: (args, kwargs) of the program. Between two ONNX files there is no program to name positional
        arguments: pass everything in kwargs, by input name.
    tol: None takes what parity takes for the dtype.

    Nodes of two graphs are paired by (module path, op, how many such came before); nodes of a graph and an
    ONNX file by the graph node's name, which the export writes into the file; nodes of two files by that name
    too, and by value name where neither has it. What has no partner is not compared.

    Raises ExportError where nothing could be paired.
    """
    by_origin = isinstance(a, OnnxModel) or isinstance(b, OnnxModel)
    named = _named_inputs(a, b, inputs)
    left, right = _values(a, inputs, named, by_origin), _values(b, inputs, named, by_origin)
    pairs = [(value, right[key]) for key, value in left.items() if key in right]
    if not pairs:
        raise ExportError("the two have no node in common: compare a program with its own export or edit")
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
    nodes = [node for node in model.nodes if node.is_value] or list(model.nodes)
    tensors = model.intermediate([node.outputs[0] for node in nodes], named)
    return {
        (node.origin or node.outputs[0],): _Value(
            node.name, node.module_path, node.op, tensors[node.outputs[0]]
        )
        for node in nodes
    }


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every tensor that an op returned, before a later op writes into it."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.values: list[tuple[fx.Node, torch.Tensor]] = []

    def record(self, inputs: InputSet) -> None:
        self.run(*flat_inputs(self.module, *inputs), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, torch.Tensor):
            self.values.append((n, value.detach().clone()))
        return value
