"""Scales and zero points of activations, as torchao's PT2E observers find them on calibration data."""

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
Edge = tuple[str, str]  # an op, and the value that it reads


@dataclass(frozen=True)
class Range:
    """How an activation becomes uint8: x / scale + zero. largest: magnitude that was seen."""

    scale: float
    zero: int
    largest: float


@dataclass(frozen=True)
class Ranges:
    """read: of edges. given: of what nodes give. By node name."""

    read: dict[Edge, Range]
    given: dict[str, Range]


class Sites(Quantizer):
    """Annotates these edges and outputs, in uint8 per tensor, and nothing else."""

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
        for node in model.graph.nodes:
            read = {x: self.spec for x in node.all_input_nodes if (node.name, x.name) in self.edges}
            given = self.spec if node.name in self.outputs else None
            if read or given:
                made = QuantizationAnnotation(input_qspec_map=read, output_qspec=given, _annotated=True)
                node.meta["quantization_annotation"] = made
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """There is nothing to hold against: which sites are fit is the pass's to say."""


def calibrate(probe: Probe, edges: Iterable[Edge], outputs: Iterable[str], observer: str) -> Ranges:
    """What observers find there on the probe's data. Raises PassError for data that does not fit the program, or that
    makes anything but finite numbers there."""
    sites, module = Sites(edges, outputs, observer), probe.module()
    _keep_from_norms(module.graph, sites.outputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_pt2e(module, sites)
        calls = [node for node in prepared.graph.nodes if node.op == "call_module"]
        observers = {str(node.target): prepared.get_submodule(str(node.target)) for node in calls}
        watches = {str(node.target): _Watch(node.all_input_nodes[0].name) for node in calls}
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
    """Sees what an observer sees: the observers themselves drop what is infinite."""

    def __init__(self, name: str) -> None:
        self.name, self.largest = name, 0.0

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.isfinite(args[0]).all():
            raise PassError(
                f"on the calibration data the value of {self.name} is infinite or no number; look at the data and the "
                "model"
            )
        self.largest = max(self.largest, float(args[0].abs().max()))


def _observer_read(node: fx.Node, x: str) -> str:
    """The observer of what an op reads: prepare_pt2e has put it between."""
    return next(
        str(n.target)
        for n in node.all_input_nodes
        if n.op == "call_module" and n.all_input_nodes[0].name == x
    )


def _observer_after(node: fx.Node) -> str:
    return next(str(user.target) for user in node.users if user.op == "call_module")


def _keep_from_norms(graph: fx.Graph, names: Iterable[str]) -> None:
    """prepare_pt2e folds a batch norm into the convolution before it; a copy between them keeps the two apart, so that
    what the convolution itself gives is observed."""
    for node in list(graph.nodes):
        if node.name in names:
            for user in [u for u in node.users if "batch_norm" in str(u.target)]:
                with graph.inserting_after(node):
                    between = graph.call_function(torch.ops.aten.clone.default, (node,))
                between.meta = dict(node.meta)
                user.replace_input_with(node, between)
