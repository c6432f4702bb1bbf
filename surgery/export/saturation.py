"""Check of integer products for overflow of 16 bits on processors without VNNI.

x86 processors without VNNI multiply uint8 activations with int8 weights by `vpmaddubsw`, which adds two neighbouring
products in 16 bits and saturates; see surgery.passes.quantize.pairs. The check reads the weights of a file, so its
result is the same on every machine. Products of signed activations and depthwise convolutions do not saturate in
onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from surgery.common.errors import ExportError
from surgery.export import metadata_keys
from surgery.export.optional import require
from surgery.passes.quantize.pairs import overflowing

# Op -> (index of the activation, index of the weight). In the first group both come from DequantizeLinear.
_DEQUANTIZED = {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (0, 1)}
_INTEGER = {
    "MatMulInteger": (0, 1), "ConvInteger": (0, 1), "QLinearMatMul": (0, 3), "QLinearConv": (0, 3),
    "QGemm": (0, 3), "MatMulIntegerToFloat": (0, 1), "DynamicQuantizeMatMul": (0, 1),
}  # fmt: skip
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")
_LISTED = 8  # products that a message names


@dataclass(frozen=True)
class Overflow:
    """An integer product that can overflow.

    Attributes:
        place: path of the layer, or name of the node.
        pairs: number of neighbouring codes whose sum exceeds the limit.
        total: number of neighbouring codes.
    """

    place: str
    pairs: int
    total: int


def overflowing_products(model: Any) -> list[Overflow]:
    """Find the integer products of an onnx_ir.Model whose sums of two products can exceed 16 bits.

    Only constant int8 weights are read. A weight that is reshaped between its codes and the product counts as
    overflowing if any two of its codes do, because its order is not followed.
    """
    return [found for node in model.graph for found in _of(node)]


def check_products(model: Any, cpu: str) -> None:
    """Refuse products that can overflow, or write into the metadata that the file needs VNNI.

    Args:
        model: the onnx_ir model.
        cpu: "any", or "vnni" if the file is for processors with VNNI alone.

    Raises:
        ExportError: a product can overflow and `cpu` is "any", or products saturate on this machine.
    """
    found = overflowing_products(model)
    if not found:
        return
    named = [f"{each.place} ({each.pairs:,} of {each.total:,} pairs)" for each in found[:_LISTED]]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    if cpu != "vnni":
        raise ExportError(
            f"int8 products that overflow 16 bits on processors without VNNI: {', '.join(named)}{more}; quantize again "
            "with --cpu any, or export with --cpu vnni for processors with VNNI alone"
        )
    if saturates_here():
        raise ExportError(
            "the file is for processors with VNNI, and int8 products saturate on this machine, so the file cannot be "
            "checked here; export it on a machine with VNNI, or quantize again with --cpu any"
        )
    model.metadata_props[metadata_keys.CPU] = cpu


def saturates_here() -> bool:
    """True if onnxruntime's products of uint8 and int8 saturate on this machine, found by computing one."""
    onnx, ort = require("onnx"), require("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    weight = onnx.numpy_helper.from_array(np.full((8, 16), 127, dtype=np.int8), "b")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("a", kinds.UINT8, ["rows", 8])],
        [helper.make_tensor_value_info("y", kinds.INT32, ["rows", 16])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # onnxruntime has separate kernels for one row and for several.
    given = [session.run(None, {"a": np.full((rows, 8), 255, dtype=np.uint8)})[0] for rows in (1, 7)]
    return any(bool((each != 8 * 255 * 127).any()) for each in given)


def _of(node: Any) -> Iterator[Overflow]:
    """Yield the overflow of a node, if it is an integer product that has one."""
    integer = _INTEGER.get(node.op_type)
    places = integer or _DEQUANTIZED.get(node.op_type)
    if places is None or len(node.inputs) <= places[1]:
        return
    activation, weight = (node.inputs[place] for place in places)
    if integer is None and not _rounded(activation):
        return
    codes, followed = _codes(weight)
    if codes is None or _signed(activation, integer is not None):
        return
    rows = _rows(node, codes, followed)
    if rows is None:
        return
    pairs = (
        int(overflowing(torch.from_numpy(np.ascontiguousarray(rows))).sum()) if followed else _any_pairs(rows)
    )
    if pairs:
        source = _source(weight)
        place = source.metadata_props.get(metadata_keys.SITE) or source.name or node.name
        yield Overflow(place, pairs, rows.shape[0] * (rows.shape[1] // 2))


def _rounded(value: Any) -> bool:
    """True if a value is dequantized from codes that are computed at run time."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in _MOVES:
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _signed(activation: Any, integer: bool) -> bool:
    """True if the codes of an activation are known to be int8. onnxruntime does not saturate products of two int8."""
    int8 = require("onnx_ir").DataType.INT8
    value = activation
    if not integer:
        while value.producer() is not None and value.producer().op_type in (*_MOVES, "DequantizeLinear"):
            last = value.producer().op_type
            value = value.producer().inputs[0]
            if last == "DequantizeLinear":
                break
    return value is not None and value.dtype == int8


def _codes(value: Any) -> tuple[Any, bool]:
    """The constant int8 codes behind a weight in the order of the product, or None.

    The second value is False if the weight is reshaped on the way, so that its order is not known.
    """
    int8 = require("onnx_ir").DataType.INT8
    turns: list[Any] = []
    followed = True
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in (*_MOVES, "DequantizeLinear"):
            return None, True
        if producer.op_type == "Transpose":
            turns.append(producer.attributes.get("perm"))
        followed = followed and producer.op_type in ("Transpose", "Identity", "DequantizeLinear")
        value = producer.inputs[0]
    if value is None or value.const_value.dtype != int8:
        return None, True
    codes = value.const_value.numpy()
    for perm in reversed(turns):
        codes = codes.transpose(perm.as_ints() if perm is not None else None)
    return codes, followed


def _rows(node: Any, codes: Any, followed: bool) -> Any:
    """Codes as (rows, K), in the order in which a kernel sums them; None for a product that cannot overflow."""
    if not followed:
        return codes.reshape(1, -1)
    if "Conv" in node.op_type:
        group = node.attributes.get("group")
        outputs, channels = codes.shape[:2]
        # onnxruntime computes depthwise convolutions in 32 bits.
        if channels == 1 and group is not None and group.as_int() == outputs:
            return None
        return np.moveaxis(codes, 1, -1).reshape(outputs, -1)
    turned = node.attributes.get("transB")
    if codes.ndim < 2:
        return codes.reshape(1, -1)
    if turned is None or not turned.as_int():
        codes = np.swapaxes(codes, -1, -2)
    return codes.reshape(-1, codes.shape[-1])


def _any_pairs(rows: Any) -> int:
    """1 if any two codes of one sign can overflow, whatever their order, else 0."""
    flat = np.sort(rows.reshape(-1).astype(np.int16))
    return int(len(flat) > 1 and bool(flat[-2:].sum() > 128 or flat[:2].sum() < -128))


def _source(value: Any) -> Any:
    """The initializer behind a weight."""
    while value.const_value is None:
        value = value.producer().inputs[0]
    return value
