"""Finds the first node of a graph whose value contains NaN or +inf."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgery.engine.module import ProgramModule
from surgery.graph.graphs import flat_inputs
from surgery.train.objective import Batch


def first_bad(module: ProgramModule, batch: Batch) -> str:
    """Run the module's graph on a batch, and describe the first node that is not finite.

    The description says so if every node is finite.
    """
    found: list[str] = []

    class Looking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if not found and _bad(value):
                found.append(_said(n))
            return value

    graph, inputs = module.graph_module(), batch["inputs"]
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with torch.no_grad():
        Looking(graph).run(*flat_inputs(graph, args, kwargs), enable_io_processing=False)
    return found[0] if found else "every node of the graph is finite, so the cause is the loss itself"


def _bad(value: Any) -> bool:
    """Return True if a value contains NaN or +inf. -inf is allowed, because attention masks contain it."""
    if isinstance(value, (tuple, list)):
        return any(_bad(item) for item in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return bool(value.isnan().any() or value.isposinf().any())


def _said(node: fx.Node) -> str:
    if node.op == "get_attr":
        return f"the weight {node.target} is already not finite"
    if node.op == "placeholder":
        return f"the input {node.name!r} is already not finite"
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f"the first node that is not finite is {node.name} ({node.target}){f' in {path}' if path else ''}"
