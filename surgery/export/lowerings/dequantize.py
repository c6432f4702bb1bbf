"""Lowering of `surgery::dequantize` to DequantizeLinear over int8 or 4-bit tensors, in a layout that onnxruntime fuses.

The translation emits a node of a private domain, which no optimization folds. After the graph is simplified, the node
is replaced as follows:

- A matrix becomes DequantizeLinear with one scale for each row, or for each block along the summed axis. A Transpose
  after it is applied to the codes. onnxruntime fuses this form into MatMulNBits.
- An embedding table becomes a Gather of codes and scales, so that only the selected rows are converted to floats.
- A Gemm with the weight becomes MatMul and Add, because onnxruntime's Gemm supports only floats.
- nf4 becomes DequantizeLinear to the codes' indices, a Gather from the 16 quantiles, and a product with the scales.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.common.errors import ExportError
from surgery.export import metadata_keys
from surgery.export.lowerings.round_activation import Rounded, take_over
from surgery.export.optional import require
from surgery.passes.quantize.codes import FORMATS, NF4, decode, unpack
from surgery.passes.quantize.ops import dequantize

DOMAIN, OP = "surgery.quantizing", "Dequantize"
OPSET = 21  # the first opset with 4-bit tensors and block-wise scales


def translation() -> Any:
    """Create the onnxscript function for torch.onnx's translation table."""
    values, defs = require("onnxscript").values, require("onnx").defs
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    optional, given = defs.OpSchema.FormalParameterOption.Optional, defs.OpSchema.FormalParameter
    kinds = defs.OpSchema.AttrType
    schema = defs.OpSchema(
        OP,
        DOMAIN,
        1,
        inputs=[
            given("codes", "C"),
            given("scale", "T"),
            given("zero", "tensor(uint8)", param_option=optional),
            given("smooth", "T", param_option=optional),
        ],
        outputs=[given("weight", "T")],
        type_constraints=[("C", ["tensor(int8)", "tensor(uint8)"], ""), ("T", floats, "")],
        attributes=[
            defs.OpSchema.Attribute("format", kinds.STRING, ""),
            defs.OpSchema.Attribute("shape", kinds.INTS, ""),
            defs.OpSchema.Attribute("order", kinds.INTS, ""),
        ],
    )
    own = values.Op(values.Opset(DOMAIN, 1), OP, schema)

    def lower(codes, scale, zero=None, format="", shape=(), order=(), smooth=None):
        inputs = [codes, scale, zero, smooth]
        # Trailing optional inputs have to be omitted; only inner ones may be empty.
        while inputs[-1] is None:
            inputs.pop()
        return own(*inputs, format=format, shape=[int(s) for s in shape], order=[int(o) for o in order])

    return lower


def opset_for(graph: torch.fx.Graph) -> int | None:
    """The opset that a graph needs for its quantized weights; None if it has no quantized weights."""
    return OPSET if any(node.target is dequantize._opoverload for node in graph.nodes) else None


@dataclass(frozen=True)
class Weight:
    """Fingerprint of a quantized weight. It identifies a float copy of the weight, whose name is unknown.

    Attributes:
        count: number of values.
        total: sum of the magnitudes of the values.
    """

    count: int
    total: float


def lower(model: Any) -> tuple[Weight, ...]:
    """Replace all Dequantize nodes of an onnx_ir.Model with standard ops.

    Returns:
        The fingerprints of the quantized weights.
    """
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP)]
    rounded = Rounded(model)
    weights = []
    for node in nodes:
        lowered = _Lowered(model, node)
        weights.append(lowered.weight())
        # Prefer integer products; the weight becomes floats only for other readers.
        if not lowered.multiply(rounded):
            lowered.replace()
    rounded.finish()
    if nodes:
        model.opset_imports.pop(DOMAIN, None)
        require("onnx_ir.passes.common").RemoveUnusedNodesPass()(model)
    return tuple(weights)


def check_kept(path: Path, weights: Sequence[Weight]) -> None:
    """Check that onnxruntime does not fold a quantized weight into floats when it optimizes the file.

    Such folding would increase memory use silently: the outputs are still correct.

    Raises:
        ExportError: onnxruntime folds a weight, computes a quantized product in floats, or cannot load the file.
    """
    ort, onnx = require("onnxruntime"), require("onnx")
    written = onnx.load(str(path), load_external_data=False)
    floats = {t.name for t in written.graph.initializer}
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base class
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ExportError(
                f"onnxruntime cannot load the file with quantized weights: {reason}; use another --format"
            ) from None
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    _check_products(optimised.graph)
    wide = (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.BFLOAT16,
    )
    for tensor in optimised.graph.initializer:
        # A tensor that still refers to the external data file is as written, so it is not a result of folding.
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if tensor.data_type not in wide or tensor.name in floats or external:
            continue
        alike = [weight.total for weight in weights if weight.count == math.prod(tensor.dims)]
        total = float(np.abs(onnx.numpy_helper.to_array(tensor)).sum(dtype=np.float64)) if alike else 0.0
        if any(math.isclose(total, other, rel_tol=1e-4) for other in alike):
            raise ExportError(
                f"onnxruntime turns a quantized weight into floats when it loads the file ({tensor.name}, "
                f"{list(tensor.dims)}); use another --format for this weight"
            )


def _check_products(graph: Any) -> None:
    """Raise ExportError if onnxruntime computes a product of two quantized operands in floats."""
    made = {output: node.op_type for node in graph.node for output in node.output}
    for node in graph.node:
        sides = [made.get(name) for name in node.input[:2]]
        if (
            node.op_type.removeprefix("Fused") in ("Conv", "Gemm", "MatMul")
            and sides == ["DequantizeLinear"] * 2
        ):
            raise ExportError(
                f"onnxruntime computes {node.name} in floats, although its weight and its input are quantized; round "
                "the output of a convolution directly after it or its relu (--output op, if an adapter is in between)"
            )


class _Lowered:
    """Lowering of one Dequantize node.

    Attributes:
        codes, scale, zero, smooth: initializers that the node reads; the last two may be None.
        shape: shape of the weight as stored.
        order: order of its axes in the matrix that was quantized.
        rows, columns: size of that matrix.
        numbers: codes as integers, (rows, columns).
        scales, zeros: values of the scales and zero points, (rows, blocks).
        block: number of columns that share a scale.
        anchor: node before which new nodes are inserted.
        users: nodes that read the weight.
    """

    def __init__(self, model: Any, node: Any) -> None:
        self.ir, self.model, self.node = require("onnx_ir"), model, node
        self.codes, self.scale = node.inputs[0], node.inputs[1]
        self.zero = node.inputs[2] if len(node.inputs) > 2 else None
        self.smooth = node.inputs[3] if len(node.inputs) > 3 else None
        given = node.attributes
        self.format = given["format"].as_string()
        self.shape, self.order = list(given["shape"].as_ints()), list(given["order"].as_ints())
        turned = [self.shape[axis] for axis in self.order]
        self.packed = packed = torch.from_numpy(np.array(self.codes.const_value.numpy()))
        self.rows, self.columns = packed.shape[0], math.prod(turned) // packed.shape[0]
        self.numbers = unpack(packed, self.format, self.columns).numpy()
        self.scales = np.array(self.scale.const_value.numpy())
        self.zeros = None if self.zero is None else np.array(self.zero.const_value.numpy())
        self.block = self.columns // self.scales.shape[1]
        self.anchor = node
        self._split_gemms()
        self.users = [use.node for use in node.outputs[0].uses()]

    def weight(self) -> Weight:
        """Fingerprint of the dequantized weight."""
        zeros = None if self.zeros is None else torch.from_numpy(self.zeros)
        # torch cannot read the bfloat16 of numpy (ml_dtypes), so convert to float32 first.
        scales = torch.from_numpy(self.scales.astype(np.float32))
        given = decode(self.packed, scales, zeros, self.format, self.columns)
        if self.smooth is not None:
            given = given / torch.from_numpy(self.smooth.const_value.numpy().astype(np.float32))
        return Weight(given.numel(), float(given.double().abs().sum()))

    def multiply(self, rounded: Rounded) -> bool:
        """Replace products with rounded activations by integer products.

        Returns:
            False, without a change, if the format does not allow it or another op reads the weight.
        """
        if self.format != "int8" or len(self.shape) != 2 or self.scales.shape[1] != 1 or not self.users:
            return False
        # Each reader of the weight: the node, the value that it reads, and whether that value is transposed.
        pairs = []
        for user in self.users:
            if _swaps(user):
                pairs += [(use.node, user.outputs[0], True) for use in user.outputs[0].uses()]
            else:
                pairs.append((user, self.node.outputs[0], False))
        # The quantized matrix is (N, K). Stored in that order, the product has to read it transposed as (K, N).
        across = self.order == [0, 1]
        for node, weight, turned in pairs:
            if not rounded.reads(node, weight, self.smooth) or turned != across:
                return False
        codes = self._store(self.codes, np.ascontiguousarray(self.numbers.T), None)
        scales = self._store(self.scale, self.scales[:, 0].astype(np.float32), None)
        for node, _, _ in pairs:
            rounded.product(node, codes, scales)
        return True

    def replace(self) -> None:
        """Replace the node with ops that compute the weight in floats."""
        weight = self.node.outputs[0]
        tables = [user for user in self.users if user.op_type == "Gather" and user.inputs[0] is weight]
        flat = len(self.shape) == 2
        if flat and self.users and len(tables) == len(self.users) and self.format != "nf4":
            for user in tables:
                self._look_up(user)
        elif flat:
            # If every reader transposes the weight, store it transposed and drop the Transpose nodes.
            turned = bool(self.users) and all(_swaps(user) for user in self.users)
            across = (self.order == [1, 0]) != turned
            matrix = self._unsmoothed(self._matrix(across), across)
            for node in self.users if turned else [self.node]:
                node.outputs[0].replace_all_uses_with(matrix, replace_graph_outputs=True)
        elif self.rows == self.shape[self.order[0]] and self.scales.shape[1] == 1 and self.format != "nf4":
            weight.replace_all_uses_with(self._as_stored(), replace_graph_outputs=True)
        else:
            # DequantizeLinear cannot express blocks over several axes: dequantize the matrix, then restore the shape.
            shaped = np.array([self.shape[axis] for axis in self.order], dtype=np.int64)
            value = self._add("Reshape", [self._matrix(across=False), self._constant("shape", shaped)])
            back = [self.order.index(axis) for axis in range(len(self.order))]
            if back != sorted(back):
                value = self._add("Transpose", [value], {"perm": back})
            weight.replace_all_uses_with(value, replace_graph_outputs=True)

    def _split_gemms(self) -> None:
        """Split each Gemm that reads the weight: onnxruntime fuses a MatMul with quantized weights, but not a Gemm."""
        weight = self.node.outputs[0]
        for gemm in [use.node for use in weight.uses() if use.node.op_type == "Gemm"]:
            given = gemm.attributes
            scaled = any(key in given and given[key].as_float() != 1 for key in ("alpha", "beta"))
            if gemm.inputs[1] is not weight or scaled or ("transA" in given and given["transA"].as_int()):
                continue
            self.anchor = gemm
            turned = "transB" in given and given["transB"].as_int()
            x, bias = gemm.inputs[0], gemm.inputs[2] if len(gemm.inputs) > 2 else None
            factor = self._add("Transpose", [weight], {"perm": [1, 0]}) if turned else weight
            value = self._add("MatMul", [x, factor], like=gemm)
            if bias is not None:
                # onnxruntime would fuse a MatMul and an Add of two axes back into a Gemm before it considers the
                # quantized weight. An additional axis around the Add prevents this.
                axis = self._constant("axis", np.array([0], dtype=np.int64))
                value = self._add("Unsqueeze", [value, axis], like=gemm)
                value = self._add("Squeeze", [self._add("Add", [value, bias], like=gemm), axis], like=gemm)
            take_over(self.model, gemm, value)
        self.anchor = self.node

    def _matrix(self, across: bool) -> Any:
        """Add nodes that compute the matrix (rows, columns), or its transpose if `across`."""

        def oriented(array: Any) -> Any:
            return np.ascontiguousarray(array.T) if across else array

        numbers, kind, zeros = self._line()
        if self.format == "nf4":
            return self._quantiles(numbers, kind, across)
        whole = self.scales.shape[1] == 1
        inputs = [
            self._store(self.codes, oriented(numbers), kind),
            self._store(self.scale, self.scales[:, 0] if whole else oriented(self.scales), None),
        ]
        if zeros is not None:
            inputs.append(self._store(self.zero, zeros[:, 0] if whole else oriented(zeros), kind))
        rows_axis, columns_axis = (1, 0) if across else (0, 1)
        blocked = {"axis": columns_axis, "block_size": self.block}
        return self._add("DequantizeLinear", inputs, {"axis": rows_axis} if whole else blocked)

    def _unsmoothed(self, matrix: Any, across: bool) -> Any:
        """Divide the columns by the smoothing factors that the weight was multiplied with before quantization."""
        if self.smooth is None:
            return matrix
        factors = self.smooth
        # The columns of the matrix are the rows of its transpose.
        if across:
            last = self._constant("last", np.array([-1], dtype=np.int64))
            factors = self._add("Unsqueeze", [factors, last])
        return self._add("Div", [matrix, factors])

    def _as_stored(self) -> Any:
        """Add a DequantizeLinear in the stored layout, for a weight with more than two axes and one scale for each row.

        QLinearConv requires this layout.
        """
        numbers, kind, zeros = self._line()
        back = [self.order.index(axis) for axis in range(len(self.order))]
        stored = numbers.reshape([self.shape[axis] for axis in self.order]).transpose(back)
        inputs = [self._store(self.codes, stored, kind), self._store(self.scale, self.scales[:, 0], None)]
        if zeros is not None:
            inputs.append(self._store(self.zero, zeros[:, 0], kind))
        return self._add("DequantizeLinear", inputs, {"axis": self.order[0]})

    def _quantiles(self, numbers: Any, kind: Any, across: bool) -> Any:
        """Add nodes that dequantize nf4: a lookup in the table of quantiles, then block-wise scales."""
        # Gather takes no 4-bit indices, so convert the codes with a DequantizeLinear of scale 1 and a Cast.
        one = self._constant("one", np.ones((), dtype=self.scales.dtype))
        line = self._add("DequantizeLinear", [self._store(self.codes, numbers, kind), one])
        index = self._add("Cast", [line], {"to": int(self.ir.DataType.INT32)})
        table = self._constant("nf4", np.array(NF4, dtype=self.scales.dtype))
        value = self._add("Gather", [table, index], {"axis": 0})
        size = np.array([self.rows, self.columns // self.block, self.block], dtype=np.int64)
        blocks = self._add("Reshape", [value, self._constant("blocks", size)])
        product = self._add("Mul", [blocks, self._store(self.scale, self.scales[:, :, None], None)])
        shape = np.array([self.rows, self.columns], dtype=np.int64)
        flat = self._add("Reshape", [product, self._constant("matrix", shape)])
        return self._add("Transpose", [flat], {"perm": [1, 0]}) if across else flat

    def _line(self) -> tuple[Any, Any, Any]:
        """Codes, their ONNX type and their zero points, such that a value is (code - zero) * scale.

        Formats without zero points use signed codes, shifted by the format's offset. nf4 codes are table indices.
        """
        kinds, numbers = self.ir.DataType, self.numbers
        if self.format == "int8":
            return numbers, kinds.INT8, None
        if self.format == "nf4":
            return numbers, kinds.UINT4, None
        if self.zeros is not None:
            return numbers, kinds.UINT4, self.zeros
        if self.format == "binary":
            return 2 * numbers.astype(np.int8) - 1, kinds.INT4, None
        return numbers.astype(np.int8) - FORMATS[self.format].offset, kinds.INT4, None

    def _look_up(self, gather: Any) -> None:
        """Replace a Gather from the weight: gather codes and scales, then multiply them."""
        self.anchor = gather
        numbers, _, zeros = self._line()
        # onnxruntime cannot Gather from 4-bit tensors, so each code is stored in a byte.
        kind = np.int8 if zeros is None else np.uint8
        index, dtype = gather.inputs[1], {"to": int(self.scale.const_value.dtype)}

        def rows(value: Any) -> Any:
            return self._add("Gather", [value, index], {"axis": 0})

        def floats(value: Any) -> Any:
            return self._add("Cast", [rows(value)], dtype)

        value = floats(self._store(self.codes, numbers.astype(kind), None))
        if self.scales.shape[1] == 1:
            value = self._add("Sub", [value, floats(self.zero)]) if zeros is not None else value
            found = self._add("Mul", [value, rows(self.scale)])
            gather.outputs[0].replace_all_uses_with(found, replace_graph_outputs=True)
            return
        # With several blocks in a row, split the last axis into (blocks, block size) to apply the scales.
        last = self._constant("last", np.array([-1], dtype=np.int64))
        scale = self._add("Unsqueeze", [rows(self.scale), last])
        size = np.array([self.scales.shape[1], self.block], dtype=np.int64)
        value = self._add("Reshape", [value, self._joined(index, "blocks", size)])
        if zeros is not None:
            value = self._add("Sub", [value, self._add("Unsqueeze", [floats(self.zero), last])])
        product = self._add("Mul", [value, scale])
        row = np.array([self.columns], dtype=np.int64)
        found = self._add("Reshape", [product, self._joined(index, "row", row)])
        gather.outputs[0].replace_all_uses_with(found, replace_graph_outputs=True)

    def _joined(self, index: Any, name: str, size: Any) -> Any:
        """Add nodes that compute the shape of `index` followed by the sizes in `size`."""
        shape = self._add("Shape", [index])
        return self._add("Concat", [shape, self._constant(name, size)], {"axis": 0})

    # -- nodes and tensors

    def _add(
        self, op: str, inputs: list[Any], attributes: Mapping[str, Any] | None = None, like: Any = None
    ) -> Any:
        """Insert a node before the anchor, with the metadata of `like` or of the Dequantize node."""
        made = self.ir.node(op, inputs, attributes=dict(attributes or {}))
        # A node next to `like` is only part of its computation, so it must not claim to have its output.
        marks = (like or self.node).metadata_props
        made.metadata_props.update(
            {k: v for k, v in marks.items() if like is None or k != metadata_keys.FX_OUTPUT}
        )
        self.model.graph.insert_before(self.anchor, [made])
        return made.outputs[0]

    def _constant(self, name: str, array: Any) -> Any:
        """Initializer named after the codes; it is created on first use."""
        full = f"{self.codes.name}.{name}"
        if full not in self.model.graph.initializers:
            self.model.graph.register_initializer(self._store(self.ir.Value(name=full), array, None))
        return self.model.graph.initializers[full]

    def _store(self, value: Any, array: Any, kind: Any) -> Any:
        """Replace the content of an initializer. Its name and provenance are kept.

        Args:
            value: the initializer.
            array: the new content.
            kind: ONNX type for 4-bit content; any other value keeps the dtype of `array`.
        """
        tensor = self._tensor(array, kind)
        value.const_value, value.shape = tensor, tensor.shape
        value.type = self.ir.TensorType(tensor.dtype)
        return value

    def _tensor(self, array: Any, kind: Any) -> Any:
        import ml_dtypes

        small = {self.ir.DataType.INT4: ml_dtypes.int4, self.ir.DataType.UINT4: ml_dtypes.uint4}
        if kind in small:
            array = array.astype(small[kind])
        return self.ir.tensor(np.ascontiguousarray(array))


def _swaps(node: Any) -> bool:
    """True if a node transposes a matrix and its output is not an output of the model."""
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return False
    perm = node.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]
