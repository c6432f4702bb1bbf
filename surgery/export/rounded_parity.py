"""Parity of files that round activations to a few levels, in the program or in onnxruntime.

A value within float error of the midpoint between two levels can round up in PyTorch and down in onnxruntime. The two
results then differ by a whole level, which can push later values over a midpoint as well. Two correct implementations
therefore differ by about as much as rounding itself changes the outputs, and no fixed tolerance separates them from a
wrong file. Such a file is checked twice:

- with the rounding of activations removed from the program and from the file, at the usual tolerance
  (surgery.export.parity);
- with rounding, as a default session of onnxruntime runs the file: `judge` compares both with the program whose
  activations are exact.

onnxruntime also rounds the inputs of products with int8 and int4 weights (MatMulNBits), although the program does
not. The program is then exact itself, and the whole change is judged.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.export.optional import require
from surgery.export.source import ExportSource, InputSet
from surgery.graph.compiled import compiled
from surgery.graph.graphs import copy_graph
from surgery.passes.quantize.ops import dequantize

# Two roundings of the same size differ by at most the sum of both. The rest is for outputs of few values.
_TWICE = 2.0
TOLERANCE = 0.05
# Measured for MatMulNBits: 0.8% for one layer, 3% for the logits of a 6-layer encoder, 63% for a model that cannot
# bear it.
RUNTIME_TOLERANCE = 0.1
_HUGE = 1e30  # masks filled with the dtype's minimum do not count
_DECIDING = ("logits", "output")


@dataclass(frozen=True)
class Judged:
    """Change of one output by the rounding of activations.

    Attributes:
        name: name of the output.
        error: root mean square difference between the file in a default session and the program with exact
            activations, as a fraction of the root mean square of the latter.
        own: the same for the program itself.
        decisions: number of rows of which the largest value is a decision; 0 if the output has none, or if the inputs
            are random.
        changed: number of decisions that the file changes.
        own_changed: number of decisions that the program itself changes.
    """

    name: str
    error: float
    own: float
    decisions: int = 0
    changed: int = 0
    own_changed: int = 0

    def ok(self, tolerance: float) -> bool:
        """True if the file changes the output at most twice as much as the program itself, plus `tolerance`."""
        allowed = _TWICE * self.own_changed + max(1.0, tolerance * self.decisions)
        return self.error <= _TWICE * self.own + tolerance and (not self.decisions or self.changed <= allowed)


@dataclass(frozen=True)
class RoundingReport:
    """Result of `judge`.

    Attributes:
        outputs: the outputs.
        tolerance: share of decisions, and of the outputs' size, that the file may change beyond twice the program's
            own.
        given: True if the inputs are data, False if they are random.
        rows: number of rows of the inputs.
        runtime: True if the program keeps activations exact, and only onnxruntime rounds them.
    """

    outputs: tuple[Judged, ...]
    tolerance: float
    given: bool
    rows: int
    runtime: bool

    @property
    def ok(self) -> bool:
        """True if every output keeps the rule."""
        return all(output.ok(self.tolerance) for output in self.outputs)

    @property
    def worst(self) -> Judged:
        """An output that breaks the rule, or the one with the largest error."""
        return max(self.outputs, key=lambda o: (not o.ok(self.tolerance), o.error))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        outputs = [vars(output) for output in self.outputs]
        return {
            "outputs": outputs,
            "tolerance": self.tolerance,
            "rows": self.rows,
            "data": self.given,
            "ok": self.ok,
        }

    @property
    def said(self) -> str:
        """The result and the rule in one line."""
        worst, where = self.worst, f"on {self.rows} {'rows of data' if self.given else 'random rows'}"
        if self.runtime:
            moved = f"{where} '{worst.name}' moves by {worst.error:.1%}"
            if worst.decisions:
                moved += f", and {worst.changed} of {worst.decisions} decisions change"
            return f"onnxruntime rounds inputs of quantized products: {moved} (allowed {self.tolerance:.0%})"
        found = ""
        if worst.decisions:
            found = (
                f"; {worst.changed} of {worst.decisions} decisions change, in the program {worst.own_changed}"
            )
        return (
            f"rounded activations: {where} they move '{worst.name}' by {worst.error:.1%} in the file and by "
            f"{worst.own:.1%} in the program{found} (allowed: twice the program's own and {self.tolerance:.0%})"
        )


def rounds(source: ExportSource) -> bool:
    """True if the program rounds activations."""
    return any(node.target in source.rounding for node in source.graph_module.graph.nodes)


def runtime_rounds(source: ExportSource) -> bool:
    """True if the program has quantized weights, for which onnxruntime may round activations by itself."""
    return any(node.target is dequantize._opoverload for node in source.graph_module.graph.nodes)


def judge(
    run: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    source: ExportSource,
    sets: Sequence[InputSet],
    *,
    given: bool = False,
    tolerance: float | None = None,
) -> RoundingReport:
    """Compare the change by rounded activations in a file with that in the program.

    Args:
        run: function that runs the file on inputs by name, in the session that users run.
        source: the program.
        sets: inputs to compare on.
        given: True if they are data. Decisions are counted on data alone: on random inputs they mean nothing.
        tolerance: see RoundingReport; None uses TOLERANCE, or RUNTIME_TOLERANCE if only onnxruntime rounds.
    """
    exact = unrounded(source) if rounds(source) else source
    sums: dict[str, _Sums] = {}
    rows = 0
    for args, kwargs in sets:
        wanted = exact.run(args, kwargs)
        own = source.run(args, kwargs) if exact is not source else wanted
        named = source.named_inputs(args, kwargs)
        found = run(named)
        rows += next((len(t) for t in named.values() if t.dim()), 1)
        for name, value in wanted.items():
            if value.is_floating_point() and value.numel():
                file = found.get(name, own[name])
                sums.setdefault(name, _Sums()).add(value, own[name], file, given and _decides(name))
    outputs = tuple(each.judged(name) for name, each in sums.items())
    if tolerance is None:
        tolerance = RUNTIME_TOLERANCE if exact is source else TOLERANCE
    return RoundingReport(outputs, tolerance, given, rows, exact is source)


class _Sums:
    """Sums of squares and counts of one output over all inputs."""

    def __init__(self) -> None:
        self.size = self.file = self.own = 0.0
        self.decisions = self.changed = self.own_changed = 0

    def add(self, exact: torch.Tensor, own: torch.Tensor, file: torch.Tensor, decides: bool) -> None:
        """Add the outputs on one input set."""
        wide = [t.detach().double() for t in (exact, own, file)]
        ordinary = torch.isfinite(wide[0]) & (wide[0].abs() < _HUGE)
        exact, own, file = (torch.where(ordinary, t, torch.zeros_like(t)) for t in wide)
        self.size += float(exact.square().sum())
        self.own += float((own - exact).square().sum())
        self.file += float((file - exact).square().sum())
        if decides and exact.dim() and exact.shape[-1] > 1:
            best = exact.argmax(-1)
            self.decisions += best.numel()
            self.changed += int((file.argmax(-1) != best).sum())
            self.own_changed += int((own.argmax(-1) != best).sum())

    def judged(self, name: str) -> Judged:
        """The result for the output."""
        size = self.size or 1.0
        file, own = ((total / size) ** 0.5 for total in (self.file, self.own))
        return Judged(name, file, own, self.decisions, self.changed, self.own_changed)


def _decides(name: str) -> bool:
    """True if the largest value of each row of an output is a decision, by the output's name."""
    return name.rpartition(".")[2] in _DECIDING


def own_error(source: ExportSource, sets: Sequence[InputSet]) -> float:
    """Largest change of an output by the program's own rounding of activations; 0 if it rounds none."""
    if not rounds(source):
        return 0.0
    # Without a file, the program stands in for it, so that only its own change is measured.
    report = judge(lambda named: {}, source, sets)
    return max((output.own for output in report.outputs), default=0.0)


def unrounded(source: ExportSource) -> ExportSource:
    """Copy of the program in which activations are not rounded."""
    graph = copy_graph(source.graph_module.graph)
    for node in list(graph.nodes):
        if node.target in source.rounding:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return replace(source, graph_module=compiled(source.graph_module, graph))


@contextlib.contextmanager
def unrounded_file(path: Path) -> Iterator[Path]:
    """Write a temporary copy of the file whose activations are not rounded.

    Pairs of QuantizeLinear and DequantizeLinear on activations are removed. DynamicQuantizeLinear is replaced by its
    input with the scale 1, and integer products of it by products of floats. The copy is deleted after the block. It is
    next to the original if that has external data, which is found there.
    """
    onnx = require("onnx")
    model = onnx.load(str(path), load_external_data=False)
    graph, helper = model.graph, onnx.helper
    made = {output: node for node in graph.node for output in node.output}
    codes = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DynamicQuantizeLinear"}
    # Output of each pair -> the value before the pair. A DequantizeLinear over a weight reads an initializer and
    # has no QuantizeLinear before it, so it stays.
    back = {}
    for node in graph.node:
        quantized = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantized is not None and quantized.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            back[node.output[0]] = quantized.input[0]
    added, kept, wide = [], [], set()
    # A graph output must keep its name, so an Identity replaces the DequantizeLinear that produced it.
    gone = set(back) & {output.name for output in graph.output}
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            one = onnx.numpy_helper.from_array(_one(), node.output[1])
            kept.append(helper.make_node("Constant", [], [node.output[1]], value=one))
            continue
        if node.op_type == "MatMulInteger" and node.input[0] in codes:
            weight = f"{node.input[1]}.unrounded"
            if weight not in wide:
                kept.append(helper.make_node("Cast", [node.input[1]], [weight], to=onnx.TensorProto.FLOAT))
                wide.add(weight)
            kept.append(helper.make_node("MatMul", [codes[node.input[0]], weight], list(node.output)))
            continue
        if node.op_type == "DequantizeLinear" and node.output[0] in gone:
            added.append(helper.make_node("Identity", [back[node.output[0]]], [node.output[0]]))
        if node.output[0] in back:
            continue
        kept.append(node)
    for node in (*kept, *added):
        for index, name in enumerate(node.input):
            # The value before a pair can itself be the output of a pair.
            while name in back:
                name = back[name]
            node.input[index] = name
    # Zero points of removed roundings have no producer any more, and only removed nodes read them.
    del graph.node[:]
    graph.node.extend([*kept, *added])
    outside = any(onnx.external_data_helper.uses_external_data(tensor) for tensor in graph.initializer)
    with tempfile.TemporaryDirectory() as folder:
        other = (path.parent if outside else Path(folder)) / f"unrounded.{path.name}"
        try:
            onnx.save(model, str(other))
            yield other
        finally:
            other.unlink(missing_ok=True)


def _one() -> Any:
    import numpy

    return numpy.array(1.0, dtype=numpy.float32)
