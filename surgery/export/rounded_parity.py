"""Parity where a program rounds activations to a few steps.

What lies within float error of the middle between two steps goes to one in PyTorch and to the other in onnxruntime: a
whole step, which moves what follows, and so more values over a middle. Two correct implementations differ by that, and
by how much depends on the model. So such a program is held to two things:

- without the rounding of activations, in the program and in the file, to the same tolerance as any other;
- with it, to twice what the program itself moves by where its parameters are moved by rounding (`sensitivity`), or
  to `ONE_STEP` where none of that happens to cross a middle.

Where ranges are found at run time the first is left out: products are of integers there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from surgery.export.optional import require
from surgery.export.source import ExportSource
from surgery.graph.graphs import copy_graph

# By how much parameters are moved: what MiniLM's activations differ by (see surgery.export.parity).
_NOISE = 1e-6
_DRAWS = 4
# Of 255 steps over a range of about 12 deviations, one in one of at least 16 summed values.
ONE_STEP = 0.012


def rounds(source: ExportSource) -> bool:
    """Whether the program rounds activations."""
    return any(node.target in source.rounding for node in source.graph_module.graph.nodes)


def sensitivity(source: ExportSource, args: Any, kwargs: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """The outputs with every floating parameter and buffer moved by rounding, drawn anew each time."""
    module = source.graph_module
    generator = torch.Generator().manual_seed(0)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found = []
    for _ in range(_DRAWS):
        moved = {
            name: t * (1 + _NOISE * torch.randn(t.shape, generator=generator).to(t))
            for name, t in held.items()
            if t.is_floating_point()
        }
        with torch.no_grad():
            found.append(
                source.named_outputs(torch.func.functional_call(module, moved, tuple(args), dict(kwargs)))
            )
    return found


def unrounded(source: ExportSource) -> ExportSource:
    """The program without the rounding of its activations."""
    graph = copy_graph(source.graph_module.graph)
    for node in list(graph.nodes):
        if node.target in source.rounding:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return replace(source, graph_module=fx.GraphModule(source.graph_module, graph))


@contextlib.contextmanager
def unrounded_file(path: Path) -> Iterator[Path | None]:
    """The file without the pairs of QuantizeLinear and DequantizeLinear over activations, beside it while this runs.

    None where activations are rounded at run time: their products are of integers, which nothing takes apart.
    """
    onnx = require("onnx")
    model = onnx.load(str(path), load_external_data=False)
    if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node):
        yield None
        return
    made = {output: node for node in model.graph.node for output in node.output}
    back = {}
    for node in model.graph.node:
        quantized = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantized is not None and quantized.op_type == "QuantizeLinear":
            back[node.output[0]] = quantized.input[0]
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            while name in back:
                name = back[name]
            node.input[index] = name
    for output in model.graph.output:
        if output.name in back:
            model.graph.node.append(onnx.helper.make_node("Identity", [back[output.name]], [output.name]))
    gone = set(back) & {output.name for output in model.graph.output}
    kept = [n for n in model.graph.node if n.op_type != "DequantizeLinear" or n.output[0] not in gone]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    other = path.with_name(f"unrounded.{path.name}")
    try:
        onnx.save(model, str(other))
        yield other
    finally:
        other.unlink(missing_ok=True)
