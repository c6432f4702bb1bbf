"""The summary of a program for a notebook."""

from __future__ import annotations

import torch

from surgery.capture.dimensions import Dimensions
from surgery.common.summary import Summary
from surgery.engine.contract.selection import in_words
from surgery.engine.replaced import replaced_weights
from surgery.engine.state import State
from surgery.graph.outputs import named_outputs


def summary(program: State) -> Summary:
    """Class, parameters, inputs and outputs of a program, and a table of the applied passes."""
    total, trainable = program.count_parameters()
    named = Dimensions(program.captured)
    inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    ends = [
        ", ".join(
            f"{name} {named.shape(node.meta['val'].shape)}"
            for name, node in nodes.items()
            if isinstance(node.meta.get("val"), torch.Tensor)
        )
        for nodes in (inputs, named_outputs(program.graph))
    ]
    left = {each.entry: str(each) for each in replaced_weights(program)}
    rows = tuple(
        (
            entry.id,
            in_words(entry, program.tensors) if entry.kind == "select" else f"{len(entry.sites)} sites",
            f"{entry.weight:g}",
            left.get(entry.id, ""),
        )
        for entry in program.journal
    )
    return Summary(
        f"Program of {type(program.base.loaded.module).__name__}",
        (
            ("parameters", f"{total:,}"),
            ("trainable", f"{trainable:,} ({100 * trainable / max(total, 1):.2f}%)"),
            ("inputs", ends[0]),
            ("outputs", ends[1]),
        ),
        ("applied", "where", "weight", "left of the weights"),
        rows,
    )
