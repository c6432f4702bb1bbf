"""Parity check of programs that round activations to a few levels.

A value within float error of the midpoint between two levels can round up in PyTorch and down in onnxruntime. The two
results then differ by a whole level, which can push later values over a midpoint as well. Two correct implementations
differ in this way, by an amount that depends on the model. Such a program is therefore checked twice:

- with activation rounding removed from the program and from the file, at the usual tolerance;
- with rounding, at twice the change of the program's own outputs under parameter noise of the size of rounding errors
  (`sensitivity`), and at least at `ONE_STEP`, because the noise may happen to push no value over a midpoint.

If activation ranges are computed at run time, the first check is skipped: the file then contains integer products that
cannot be separated from the rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery.export.optional import require
from surgery.export.source import ExportSource
from surgery.graph.compiled import compiled
from surgery.graph.graphs import copy_graph

# Relative noise added to parameters: the measured difference of MiniLM's activations (see surgery.export.parity).
_NOISE = 1e-6
_DRAWS = 4
# Effect of one value that moves by one level: 255 levels span about 12 standard deviations, and an output sums at
# least 16 values, so 12 / 255 / sqrt(16).
ONE_STEP = 0.012


def rounds(source: ExportSource) -> bool:
    """True if the program rounds activations."""
    return any(node.target in source.rounding for node in source.graph_module.graph.nodes)


def sensitivity(source: ExportSource, args: Any, kwargs: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Compute the program's outputs under random relative noise on all floating-point parameters and buffers.

    Args:
        source: the program.
        args: positional inputs.
        kwargs: inputs by name.

    Returns:
        The outputs by name, for each of several noise draws.
    """
    module = source.graph_module
    generator = torch.Generator().manual_seed(0)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found = []
    for _ in range(_DRAWS):
        perturbed = {
            name: t * (1 + _NOISE * torch.randn(t.shape, generator=generator).to(t))
            for name, t in held.items()
            if t.is_floating_point()
        }
        with torch.no_grad():
            found.append(
                source.named_outputs(torch.func.functional_call(module, perturbed, tuple(args), dict(kwargs)))
            )
    return found


def unrounded(source: ExportSource) -> ExportSource:
    """Copy of the program in which activations are not rounded."""
    graph = copy_graph(source.graph_module.graph)
    for node in list(graph.nodes):
        if node.target in source.rounding:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return replace(source, graph_module=compiled(source.graph_module, graph))


@contextlib.contextmanager
def unrounded_file(path: Path) -> Iterator[Path | None]:
    """Write a temporary copy of the file without QuantizeLinear/DequantizeLinear pairs on activations.

    The copy is next to the original, where external data is found, and is deleted after the block. Yields None if
    activation ranges are computed at run time: the file then contains integer products, which cannot be undone.
    """
    onnx = require("onnx")
    model = onnx.load(str(path), load_external_data=False)
    if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node):
        yield None
        return
    made = {output: node for node in model.graph.node for output in node.output}
    # Output of each pair -> the value before the pair. A DequantizeLinear over a weight reads an initializer and has no
    # QuantizeLinear before it, so it stays.
    back = {}
    for node in model.graph.node:
        quantized = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantized is not None and quantized.op_type == "QuantizeLinear":
            back[node.output[0]] = quantized.input[0]
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            # The value before a pair can itself be the output of a pair.
            while name in back:
                name = back[name]
            node.input[index] = name
    # A graph output must keep its name, so an Identity replaces the DequantizeLinear that produced it.
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
