"""Lowering of `surgery::round_activation` to DynamicQuantizeLinear and MatMulInteger in standard ONNX.

onnxruntime fuses an integer product and its scales into one kernel: MatMulIntegerToFloat, or DynamicQuantizeMatMul if
the rounding is included. All products with an activation share one rounding. Other ops that read the rounded activation
get it dequantized to floats.

With per_token, each row is divided by its largest magnitude, so that all rows share one constant step size. The
product is then a MatMul of two DequantizeLinear outputs, which onnxruntime also fuses into MatMulIntegerToFloat. Its
result is multiplied by the magnitudes. With twice, the rounding error of the activation is quantized as well, and a
product is the sum of two integer products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surgery.export.optional import require
from surgery.passes.quantize.ops import FINER, SMALLEST, STEP

DOMAIN, OP = "surgery.quantizing", "RoundActivation"


def translation() -> Any:
    """Create the onnxscript function for torch.onnx's translation table.

    It emits a node of a private domain, which no optimization folds. `Rounded` replaces that node later.
    """
    values, defs = require("onnxscript").values, require("onnx").defs
    given, optional = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption.Optional
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    schema = defs.OpSchema(
        OP,
        DOMAIN,
        1,
        inputs=[given("x", "T"), given("smooth", "S", param_option=optional)],
        outputs=[given("y", "T")],
        type_constraints=[("T", floats, ""), ("S", floats, "")],
        attributes=[
            defs.OpSchema.Attribute(n, defs.OpSchema.AttrType.INT, "") for n in ("per_token", "twice")
        ],
    )
    own = values.Op(values.Opset(DOMAIN, 1), OP, schema)

    def lower(x, smooth=None, per_token=False, twice=False):
        given = (each for each in (x, smooth) if each is not None)
        return own(*given, per_token=int(per_token), twice=int(twice))

    return lower


@dataclass(frozen=True)
class _Levels:
    """A quantized activation: codes = round(wide / step) + zero. The fields are ONNX values.

    Attributes:
        wide: the activation as float32, divided by the smoothing factors and by `rows`.
        codes: the codes.
        step: step size of the codes.
        zero: zero point of the codes.
        rows: scale of each row; None for one scale for the whole tensor.
        residual: quantized rounding error of `wide`; None if it is not used.
    """

    wide: Any
    codes: Any
    step: Any
    zero: Any
    rows: Any = None
    residual: _Levels | None = None


class Rounded:
    """Lowering of all RoundActivation nodes of an onnx_ir.Model.

    Call `product` for each MatMul with a quantized weight first, and `finish` for all other uses at the end.
    """

    def __init__(self, model: Any) -> None:
        self.ir, self.model = require("onnx_ir"), model
        self.nodes = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, OP)]
        self._outputs = {id(node.outputs[0]): node for node in self.nodes}
        self._codes: dict[tuple[int, int, bool, bool], _Levels] = {}

    def reads(self, node: Any, weight: Any, smooth: Any) -> bool:
        """True if a node is the MatMul of a rounded activation and this weight, with the same smoothing factors.

        Args:
            node: the ONNX node.
            weight: the ONNX value of the weight.
            smooth: the smoothing factors of the weight, or None.
        """
        if node.op_type != "MatMul" or node.inputs[1] is not weight:
            return False
        rounded = self._outputs.get(id(node.inputs[0]))
        return rounded is not None and _smooth(rounded) is smooth

    def product(self, node: Any, codes: Any, scales: Any) -> None:
        """Replace a MatMul with an integer product.

        Args:
            node: the MatMul node, for which `reads` is True.
            codes: int8 codes of the weight, of shape (K, N).
            scales: float32 scales of the columns, of shape (N,).
        """
        rounded = self._outputs[id(node.inputs[0])]
        given = self._quantized(rounded)
        kind = node.inputs[0].dtype or self.ir.DataType.FLOAT

        def add(op: str, inputs: list[Any], **attributes: Any) -> Any:
            return self._add(node, op, inputs, **attributes)

        def multiplied(levels: _Levels) -> Any:
            # onnxruntime fuses exactly this chain of MatMulInteger, Cast and Mul with the product of the scales.
            if levels.rows is None:
                counted = add("MatMulInteger", [levels.codes, codes, levels.zero])
                counted = add("Cast", [counted], to=int(self.ir.DataType.FLOAT))
                return add("Mul", [counted, add("Mul", [levels.step, scales])])
            # With a constant step size, onnxruntime fuses only a MatMul of two DequantizeLinear outputs.
            weight = add("DequantizeLinear", [codes, scales], axis=1)
            return add("MatMul", [self._level(node, levels), weight])

        value = multiplied(given)
        if given.residual is not None:
            value = add("Add", [value, multiplied(given.residual)])
        # The scale of a row is a factor of the whole row of the product, so it can be applied at the end.
        if given.rows is not None:
            value = add("Mul", [value, given.rows])
        if kind != self.ir.DataType.FLOAT:
            value = add("Cast", [value], to=int(kind))
        take_over(self.model, node, value)

    def finish(self) -> None:
        """Dequantize the activations for all remaining uses, and remove nodes without uses."""
        for node in self.nodes:
            if node.outputs[0].uses() or node.outputs[0].is_graph_output():
                given = self._quantized(node)
                value = self._floats(node, given)
                if given.rows is not None:
                    value = self._add(node, "Mul", [value, given.rows])
                # Products skip this factor, because the codes of the weight contain it. Other readers need it.
                if (smooth := _smooth(node)) is not None:
                    value = self._add(node, "Mul", [value, self._wide(node, smooth)])
                kind = node.inputs[0].dtype or self.ir.DataType.FLOAT
                if kind != self.ir.DataType.FLOAT:
                    value = self._add(node, "Cast", [value], to=int(kind))
                take_over(self.model, node, value)
            else:
                self.model.graph.remove(node, safe=True)

    def _quantized(self, node: Any) -> _Levels:
        """Quantize the input of a node. Nodes with equal input and options share the result."""
        x, smooth = node.inputs[0], _smooth(node)
        per_token, twice = (bool(node.attributes[name].as_int()) for name in ("per_token", "twice"))
        key = id(x), id(smooth), per_token, twice
        if key not in self._codes:
            wide = self._wide(node, x)
            if smooth is not None:
                wide = self._divide(node, wide, self._wide(node, smooth))
            found = self._per_row(node, wide) if per_token else self._per_tensor(node, wide)
            self._codes[key] = replace(found, residual=self._residual(node, found)) if twice else found
        return self._codes[key]

    def _per_tensor(self, node: Any, wide: Any) -> _Levels:
        """Quantize with one scale and zero point for the whole tensor."""
        made = self.ir.node("DynamicQuantizeLinear", [wide], num_outputs=3)
        made.metadata_props.update(node.metadata_props)
        self.model.graph.insert_before(node, [made])
        return _Levels(wide, *made.outputs)

    def _per_row(self, node: Any, wide: Any) -> _Levels:
        """Quantize with one scale for each row and no zero point."""
        last = self._constant("last", np.array([-1], dtype=np.int64))
        top, bottom = (self._add(node, op, [wide, last], keepdims=1) for op in ("ReduceMax", "ReduceMin"))
        # The lower bound avoids a division by zero for a row of zeros.
        smallest = self._constant("smallest", np.float32(SMALLEST))
        rows = self._add(node, "Max", [top, self._add(node, "Neg", [bottom]), smallest])
        step = self._constant("step", np.float32(STEP))
        return self._coded(node, self._divide(node, wide, rows), step, rows)

    def _divide(self, node: Any, value: Any, by: Any) -> Any:
        """Multiply by the reciprocal of `by`, which is small or constant.

        An elementwise division takes a CPU as long as a dozen multiplications.
        """
        return self._add(node, "Mul", [value, self._add(node, "Reciprocal", [by])])

    def _residual(self, node: Any, given: _Levels) -> _Levels:
        """Quantize the rounding error of `given` with a finer step."""
        error = self._add(node, "Sub", [given.wide, self._level(node, given)])
        if given.rows is not None:
            return self._coded(
                node, error, self._constant("finer_step", np.float32(STEP * FINER)), given.rows
            )
        finer = self._constant("finer", np.float32(FINER))
        return self._coded(node, error, self._add(node, "Mul", [given.step, finer]))

    def _coded(self, node: Any, wide: Any, step: Any, rows: Any = None) -> _Levels:
        """Quantize symmetrically with a given step.

        The codes are uint8 with zero point 128, because onnxruntime has fast products of uint8 with int8.
        """
        zero = self._constant("zero", np.uint8(128))
        return _Levels(wide, self._add(node, "QuantizeLinear", [wide, step, zero]), step, zero, rows)

    def _floats(self, node: Any, given: _Levels) -> Any:
        """Dequantized activation including the residual, still divided by `rows` and the smoothing factors."""
        value = self._level(node, given)
        return (
            value
            if given.residual is None
            else self._add(node, "Add", [value, self._level(node, given.residual)])
        )

    def _level(self, node: Any, given: _Levels) -> Any:
        """Dequantize the codes without the residual."""
        return self._add(node, "DequantizeLinear", [given.codes, given.step, given.zero])

    def _constant(self, name: str, value: Any) -> Any:
        """Initializer shared by all activations of the model."""
        full, held = f"surgery.round_activation.{name}", self.model.graph.initializers
        if full not in held:
            made = self.ir.Value(name=full, const_value=self.ir.tensor(np.asarray(value)))
            made.shape, made.type = made.const_value.shape, self.ir.TensorType(made.const_value.dtype)
            self.model.graph.register_initializer(made)
        return held[full]

    def _wide(self, node: Any, value: Any) -> Any:
        """Cast a value to float32 if necessary."""
        if (value.dtype or self.ir.DataType.FLOAT) == self.ir.DataType.FLOAT:
            return value
        return self._add(node, "Cast", [value], to=int(self.ir.DataType.FLOAT))

    def _add(self, anchor: Any, op: str, inputs: list[Any], **attributes: Any) -> Any:
        """Insert a node before `anchor` with the metadata of `anchor`, and return its output."""
        made = self.ir.node(op, inputs, attributes=attributes)
        made.metadata_props.update(anchor.metadata_props)
        self.model.graph.insert_before(anchor, [made])
        return made.outputs[0]


def _smooth(node: Any) -> Any:
    """Smoothing factors of a RoundActivation node, or None."""
    return node.inputs[1] if len(node.inputs) > 1 else None


def take_over(model: Any, node: Any, value: Any) -> None:
    """Replace the output of a node with `value`, which takes over its name, type and metadata, and remove the node.

    Args:
        model: the onnx_ir model.
        node: the node to remove.
        value: output of another node.
    """
    old = node.outputs[0]
    name, value.type, value.shape = old.name, old.type, old.shape
    value.producer().metadata_props.update(node.metadata_props)
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    # Rename last: two values of the graph must not have the same name, and a model output has to keep its name.
    value.name = name
