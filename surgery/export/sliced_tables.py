"""Lengths of slices of tables, stated so that onnxruntime's symbolic shape inference can follow them.

A model that reads the first `seq` rows of a table of positions has a Slice of a constant. The inference, which
onnxruntime's quantization tools run first, gives it the length Min(512, seq), which does not match `seq` where the
positions are added. A Reshape to the length that was asked for, which copies nothing, gives it that length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.export.optional import require

_PREFIX = "surgery.sliced_tables"


def state_lengths(model: Any) -> int:
    """Insert a Reshape after each slice of a constant with a dynamic end, in place, and return their number."""
    ir = require("onnx_ir")
    found = 0
    for node in list(model.graph):
        axis = _sliced_axis(node)
        if axis is None:
            continue
        table, end = node.inputs[0], node.inputs[2]
        parts = [
            end if place == axis else _constant(ir, model, int(size))
            for place, size in enumerate(table.shape)
        ]
        shape = end if len(parts) == 1 else None
        made = []
        if shape is None:
            joined = ir.node("Concat", parts, attributes={"axis": 0})
            shape = joined.outputs[0]
            made.append(joined)
        old = node.outputs[0]
        users = [(use.node, use.idx) for use in old.uses()]
        reshaped = ir.node("Reshape", [old, shape])
        made.append(reshaped)
        value = reshaped.outputs[0]
        value.type, value.shape = old.type, old.shape
        model.graph.insert_after(node, made)
        for user, index in users:
            user.replace_input_with(index, value)
        for each in made:
            each.metadata_props.update(node.metadata_props)
        found += 1
    return found


def _sliced_axis(node: Any) -> int | None:
    """The axis of a slice of a constant from 0 to a dynamic end, with one axis and step 1; None for other nodes."""
    if node.op_type != "Slice" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return None
    given = [*node.inputs, None, None][:5]
    table, starts, ends, axes, steps = given
    if not table.is_initializer() or table.shape is None or ends.const_value is not None:
        return None
    known = [_single(value) for value in (starts, axes, steps)]
    if (
        known[0] != 0
        or known[1] is None
        or known[2] not in (None, 1)
        or (steps is not None and known[2] is None)
    ):
        return None
    length = ends.shape
    if length is None or list(length) != [1] or not all(isinstance(size, int) for size in table.shape):
        return None
    return known[1] % len(table.shape)


def _single(value: Any) -> int | None:
    """The value of a constant of one integer, or None."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return int(value.const_value.numpy().reshape(()))


def _constant(ir: Any, model: Any, size: int) -> Any:
    """An initializer of one integer, shared by all slices."""
    name, held = f"{_PREFIX}.{size}", model.graph.initializers
    if name not in held:
        value = ir.Value(name=name, const_value=ir.tensor(np.array([size], dtype=np.int64)))
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    return held[name]
