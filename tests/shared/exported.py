"""Programs to export: captured as surgery captures them, and adapted by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from surgery.export import ExportSource

aten = torch.ops.aten
Update = Callable[[fx.Graph, fx.Node, Any, str], tuple[fx.Node, dict[str, torch.Tensor]]]


def capture(
    module: nn.Module, kwargs: dict[str, Any], shapes: Any, keys: Sequence[str] | None = None
) -> ExportSource:
    module.eval()
    forward = module.forward

    def as_dict(**given: Any) -> Any:
        out = forward(**given)
        return {key: out[key] for key in keys} if keys else dict(out)

    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in kwargs]
    as_dict.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    module.forward = as_dict  # type: ignore[method-assign]
    try:
        program = torch.export.export(module, (), kwargs, dynamic_shapes=shapes, strict=False)
    finally:
        del module.forward
    return ExportSource(program.module(check_guards=False), (), kwargs, shapes)


def text_inputs(vocab: int, batch: int = 2, seq: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, seq, dtype=torch.long)
    mask[0, seq // 2 :] = 0
    return {
        "input_ids": torch.randint(1, vocab, (batch, seq), generator=generator),
        "attention_mask": mask,
    }


def text_shapes(longest: int) -> dict[str, Any]:
    axes = {0: torch.export.Dim("batch", min=1, max=1024), 1: torch.export.Dim("seq", min=1, max=longest)}
    return {"input_ids": axes, "attention_mask": axes}


def weight_ops(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in graph_module.graph.nodes
        if node.target in (aten.linear.default, aten.addmm.default)
        and node.args[1].op in ("get_attr", "call_function")
    ]


def add_lora(
    source: ExportSource, rank: int = 3, custom: bool = True, only: Callable[[str], bool] = lambda name: True
) -> dict[str, dict[str, str]]:
    """y + (x Aᵀ) Bᵀ at every linear, A and B random. Returns the provenance of what it inserted."""
    program, provenance = source.graph_module, {}
    generator = torch.Generator().manual_seed(5)
    for node in weight_ops(program):
        if node.target is not aten.linear.default or not only(node.args[1].target):
            continue
        owner = node.args[1].target.rpartition(".")[0]
        module = program.get_submodule(owner)
        out_features, in_features = module.weight.shape
        shapes = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
        for name, shape in shapes.items():
            module.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * 0.1))
            provenance[f"{owner}.{name}"] = {"pass": "lora", "name": "default", "site": f"{owner}.weight"}
        with program.graph.inserting_after(node):
            add = program.graph.call_function(aten.add.Tensor, (node, node))
        with program.graph.inserting_before(add):
            a = program.graph.get_attr(f"{owner}.lora_A")
            b = program.graph.get_attr(f"{owner}.lora_B")
            inner = program.graph.call_function(aten.linear.default, (node.args[0], a))
            delta = program.graph.call_function(aten.linear.default, (inner, b))
        node.replace_all_uses_with(add)
        add.args = (node, delta)
        for new in (a, b, inner, delta, add):
            new.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            if custom:
                new.meta["custom"] = {"surgery": provenance[f"{owner}.lora_A"]}
    program.recompile()
    return provenance


def merge_lora(
    source: ExportSource, provenance: dict[str, dict[str, str]], into: nn.Module | fx.GraphModule
) -> None:
    """W + B A into the same weights of `into`, which must not share them with `source`."""
    with torch.no_grad():
        for name in provenance:
            if name.endswith("lora_A"):
                owner = name.rpartition(".")[0]
                adapted = source.graph_module.get_submodule(owner)
                into.get_submodule(owner).weight.add_(adapted.lora_B @ adapted.lora_A)


def add_dora(source: ExportSource, rank: int = 2) -> dict[str, dict[str, str]]:
    """x (m (W + B A) / |W + B A|)ᵀ at the first linear: a constant weight that must stay a formula."""
    program = source.graph_module
    node = next(each for each in weight_ops(program) if each.target is aten.linear.default)
    owner = node.args[1].target.rpartition(".")[0]
    module = program.get_submodule(owner)
    out_features, in_features = module.weight.shape
    generator = torch.Generator().manual_seed(6)
    module.register_parameter(
        "dora_A", nn.Parameter(torch.randn(rank, in_features, generator=generator) * 0.1)
    )
    module.register_parameter(
        "dora_B", nn.Parameter(torch.randn(out_features, rank, generator=generator) * 0.1)
    )
    module.register_parameter("dora_m", nn.Parameter(torch.rand(out_features, 1, generator=generator) + 0.5))
    graph = program.graph
    with graph.inserting_before(node):
        a, b, m = (graph.get_attr(f"{owner}.dora_{part}") for part in "ABm")
        update = graph.call_function(aten.matmul.default, (b, a))
        whole = graph.call_function(aten.add.Tensor, (node.args[1], update))
        norm = graph.call_function(aten.linalg_vector_norm.default, (whole, 2, [1], True))
        scaled = graph.call_function(
            aten.mul.Tensor, (whole, graph.call_function(aten.div.Tensor, (m, norm)))
        )
    node.args = (node.args[0], scaled, *node.args[2:])
    program.recompile()
    site = {"pass": "dora", "name": "default", "site": f"{owner}.weight"}
    return {f"{owner}.dora_{part}": site for part in "ABm"}
