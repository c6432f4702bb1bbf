"""Scales and zero points of activations, found by torchao's PT2E observers on calibration data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from surgery.api import PassError, Probe

OBSERVERS = {
    "histogram": HistogramObserver,
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageMinMaxObserver,
}
Edge = tuple[str, str]  # names of an op and of a value that it reads


@dataclass(frozen=True)
class Range:
    """Quantization of an activation to uint8: x / scale + zero.

    Attributes:
        scale: Step between two codes.
        zero: Code of the value zero.
        largest: Largest magnitude seen on the data.
    """

    scale: float
    zero: int
    largest: float


@dataclass(frozen=True)
class Ranges:
    """Ranges found on the data.

    Attributes:
        read: Range of the value that an op reads, by edge.
        given: Range of a node's output, by node name.
    """

    read: dict[Edge, Range]
    given: dict[str, Range]


class Sites(Quantizer):
    """A torchao quantizer that annotates given edges and outputs, as uint8 per tensor, and nothing else.

    Args:
        edges: Edges to observe.
        outputs: Names of nodes whose outputs to observe.
        observer: Name in OBSERVERS.
    """

    def __init__(self, edges: Iterable[Edge], outputs: Iterable[str], observer: str) -> None:
        super().__init__()
        self.edges, self.outputs = frozenset(edges), frozenset(outputs)
        self.spec = QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=OBSERVERS[observer],
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
        )

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Write the annotations into the graph."""
        for node in model.graph.nodes:
            read = {x: self.spec for x in node.all_input_nodes if (node.name, x.name) in self.edges}
            given = self.spec if node.name in self.outputs else None
            if read or given:
                made = QuantizationAnnotation(input_qspec_map=read, output_qspec=given, _annotated=True)
                node.meta["quantization_annotation"] = made
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Do nothing: the pass has already checked the sites."""


def calibrate(probe: Probe, edges: Iterable[Edge], outputs: Iterable[str], observer: str) -> Ranges:
    """Run the data through the program and return the ranges that observers find.

    Args:
        probe: The program and its data.
        edges: Edges to observe.
        outputs: Names of nodes whose outputs to observe.
        observer: Name in OBSERVERS.

    Raises:
        PassError: The data do not fit the program, or an observed value contains inf or NaN.
    """
    sites, module = Sites(edges, outputs, observer), probe.module()
    _keep_from_norms(module.graph, sites.outputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_pt2e(module, sites)
        calls = [node for node in prepared.graph.nodes if node.op == "call_module"]
        observers = {str(node.target): prepared.get_submodule(str(node.target)) for node in calls}
        watches = {str(node.target): _Watch(node.all_input_nodes[0].name) for node in calls}
        # The hooks run before the observers, so an infinite value is reported before an observer drops it.
        for name, each in observers.items():
            each.register_forward_pre_hook(watches[name])
        probe.run(prepared)
        found = {}
        for name, each in observers.items():
            scale, zero = each.calculate_qparams()
            found[name] = Range(float(scale), int(zero), watches[name].largest)
    nodes = {node.name: node for node in prepared.graph.nodes}
    read = {(op, x): found[_observer_read(nodes[op], x)] for op, x in sites.edges}
    given = {name: found[_observer_after(nodes[name])] for name in sites.outputs}
    return Ranges(read, given)


class _Watch:
    """A hook that sees the values of an observer, because observers silently ignore inf.

    Attributes:
        name: Name of the observed value.
        largest: Largest magnitude seen.
    """

    def __init__(self, name: str) -> None:
        self.name, self.largest = name, 0.0

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.isfinite(args[0]).all():
            raise PassError(
                f"on the calibration data the value of {self.name} contains inf or NaN; check the data and the model"
            )
        self.largest = max(self.largest, float(args[0].abs().max()))


def _observer_read(node: fx.Node, x: str) -> str:
    """Return the name of the observer that prepare_pt2e inserted between an op and a value that it reads."""
    return next(
        str(n.target)
        for n in node.all_input_nodes
        if n.op == "call_module" and n.all_input_nodes[0].name == x
    )


def _observer_after(node: fx.Node) -> str:
    """Return the name of the observer of a node's output."""
    return next(str(user.target) for user in node.users if user.op == "call_module")


def _keep_from_norms(graph: fx.Graph, names: Iterable[str]) -> None:
    """Insert a copy between each named node and a batch norm that reads it.

    prepare_pt2e folds a batch norm into the convolution before it. The copy prevents that, so that the output of the
    convolution itself is observed.
    """
    for node in list(graph.nodes):
        if node.name in names:
            for user in [u for u in node.users if "batch_norm" in str(u.target)]:
                with graph.inserting_after(node):
                    between = graph.call_function(torch.ops.aten.clone.default, (node,))
                between.meta = dict(node.meta)
                user.replace_input_with(node, between)
