"""Matching and rewriting every linear of a graph, against torch.fx.replace_pattern and onnxscript's rewriter.

All three insert the same LoRA branch at the same number of places, in stacks of one traced layer (see stack.py). Ours
indexes the sites, selects `all-linear`, and inserts the nodes with metadata. Copying and compiling the graph and
checking the outputs are timed separately, because no peer does them; replace_pattern's own recompile is disabled. The
peers insert one A and B for all sites, without metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

import surgery
from benchmarks.models import require
from benchmarks.stack import WIDTH, fx_stack, layers_for, onnx_stack
from benchmarks.timing import Row, Variant, compare, measure
from surgery.engine import replay
from surgery.engine.contract.numerics import EXACT
from surgery.engine.contract.observe import observe
from surgery.graph.fake import MetaCache
from surgery.graph.graphs import copy_graph
from surgery.graph.sites import SiteIndex
from surgery.graph.targets import select_sites
from surgery.graph.view import View

AIM, LINEAR_AIM = 0.25, 1.2
RANK, SCALE = 8, 2.0
SIZES, MIDDLE = (1_300, 5_400, 10_800, 100_000), 10_800
aten = torch.ops.aten


def run(quick: bool) -> Iterator[Row]:
    require("onnxscript", "the comparison with onnxscript's rewriter")
    per_node: dict[int, float] = {}
    for size in SIZES[:1] if quick else SIZES:
        layers = layers_for(size)
        program = fx_stack(layers)
        nodes = len(program.graph.nodes)
        lora = surgery.Lora(target="all-linear", rank=RANK)
        adapted = program.apply(lora, freeze_base=False, verify=False)
        variants = {"ours": _ours(program, adapted)}
        if size <= MIDDLE:
            variants["fx.replace_pattern"] = _replace_pattern(program, 6 * layers)
        variants["onnxscript"] = _onnxscript(layers)
        times = measure(variants, rounds=3 if quick or size > MIDDLE else 7)
        per_node[size] = times.median("ours") / nodes
        note = f"{6 * layers:,} linears"
        for peer in list(variants)[1:]:
            aim = AIM if size == MIDDLE else None
            yield compare("match", f"{nodes:,} nodes: match, rewrite", times, "ours", peer, aim, note)
        if size > MIDDLE:
            # Its time grows 3.7 times when the nodes double, so this size would take minutes.
            what = f"{nodes:,} nodes: match, rewrite"
            yield Row(
                "match", what, "fx.replace_pattern", times.median("ours"), note="peer left out: quadratic"
            )
        yield from _beside(program, adapted, nodes, rounds=1 if size > MIDDLE else 3)
    if not quick:
        small, large = per_node[MIDDLE] * 1e6, per_node[SIZES[-1]] * 1e6
        what = "time per node, at 100,000 over 10,800"
        yield Row("match", what, "", large, small, large / small, aim=LINEAR_AIM, unit="µs")


def _ours(program: surgery.Program, adapted: surgery.Program) -> Variant:
    (entry,) = adapted.journal
    pass_ = replay.pass_of(entry, program.base.plugins)
    base = program.base
    roles = base.roles

    def rewrite(graph: fx.Graph) -> None:
        index = SiteIndex(graph, base.names, base.plugins.weight_ops, roles)
        sites = select_sites(index.sites, "all-linear")
        view = View(graph, base.names, base.plugins.weight_ops)
        replay.rewrite_entry(entry, pass_, graph, MetaCache(graph), sites, adapted.tensors, view)  # type: ignore[arg-type]

    return Variant(rewrite, lambda: copy_graph(program.graph))


def _beside(program: surgery.Program, adapted: surgery.Program, nodes: int, rounds: int) -> Iterator[Row]:
    """Times of the steps that the peers leave to the user."""
    module = adapted.graph_module
    reference = program.run()

    def prove(_: None) -> None:
        assert observe(reference, adapted.run()).within(EXACT)

    steps = {
        "copy": Variant(lambda _: copy_graph(program.graph)),
        "lint": Variant(lambda _: adapted.graph.lint()),
        "recompile": Variant(lambda _: module.recompile()),
        "verify": Variant(prove),
    }
    times = measure(steps, rounds, warmup=0)
    for name in steps:
        yield Row("match", f"{nodes:,} nodes: {name}", ours=times.median(name))


class _Adapted(nn.Module):
    """The branch that `add_branch` inserts, as a module for replace_pattern to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.zeros(RANK, WIDTH))
        self.lora_b = nn.Parameter(torch.zeros(WIDTH, RANK))

    def forward(self, x, weight, bias):
        out = aten.linear.default(x, weight, bias)
        hidden = aten.reshape.default(aten.linear.default(x, self.lora_a), [-1, RANK])
        flat = aten.reshape.default(out, [-1, WIDTH])
        summed = aten.addmm.default(flat, hidden, aten.t.default(self.lora_b), alpha=SCALE)
        return aten.view_as.default(summed, out)


def _replace_pattern(program: surgery.Program, expected: int) -> Variant:
    source = program.base.captured.graph_module
    replacement = fx.symbolic_trace(_Adapted())

    def pattern(x, weight, bias):
        return aten.linear.default(x, weight, bias)

    def prepare() -> fx.GraphModule:
        module = fx.GraphModule(source, copy_graph(source.graph))
        module.__dict__["recompile"] = lambda: None
        return module

    def rewrite(module: fx.GraphModule) -> None:
        found = fx.replace_pattern(module, pattern, replacement)
        assert len(found) == expected

    return Variant(rewrite, prepare)


def _onnxscript(layers: int) -> Variant:
    import onnx_ir as ir
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    a = ir.tensor(torch.zeros(WIDTH, RANK).numpy(), name="lora_a")
    b = ir.tensor(torch.zeros(RANK, WIDTH).numpy(), name="lora_b")

    def pattern(op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Add(op.MatMul(x, weight), bias)

    def replacement(op: Any, x: Any, weight: Any, bias: Any) -> Any:
        hidden = op.MatMul(x, op.Constant(value=a))
        # Rules are also tried on inserted nodes: an Add would match again without end, a Sum does not.
        return op.Sum(op.MatMul(x, weight), bias, op.MatMul(hidden, op.Constant(value=b)))

    rules = RewriteRuleSet([RewriteRule(pattern, replacement)])

    def rewrite(model: Any) -> None:
        assert rules.apply_to_model(model) == 6 * layers

    return Variant(rewrite, lambda: onnx_stack(layers))
