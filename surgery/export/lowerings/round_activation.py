"""`surgery::round_activation` in standard ONNX: DynamicQuantizeLinear and MatMulInteger with the codes of a weight.

onnxruntime makes one kernel of a product and its scales (MatMulIntegerToFloat, or DynamicQuantizeMatMul with the
rounding). What is rounded once is read by all products of it. Whatever else reads the rounded activation gets it
back as floats.

With a scale for each row (per_token) the rows are divided by their largest magnitude, which leaves one step for all of
them, a constant: QuantizeLinear and DequantizeLinear on both sides of a MatMul, which is MatMulIntegerToFloat then, and
the product is multiplied with the magnitudes. Rounded twice, what the codes leave has codes of its own, and a product
is the sum of two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surgery.export.optional import require
from surgery.passes.quantize.ops import FINER, SMALLEST, STEP

DOMAIN, OP = "surgery.quantizing", "RoundActivation"


def translation() -> Any:
    """The onnxscript function for torch.onnx's table."""
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
    """codes = round(wide / step) + zero. wide: x / smooth / rows. rows: of a scale for each row, or None. left: the
    levels of what wide is more than its codes stand for, or None."""

    wide: Any
    codes: Any
    step: Any
    zero: Any
    rows: Any = None
    left: _Levels | None = None


class Rounded:
    """The rounded activations of an onnx_ir.Model: `product` for each weight that they meet, `finish` for the rest."""

    def __init__(self, model: Any) -> None:
        self.ir, self.model = require("onnx_ir"), model
        self.nodes = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, OP)]
        self._outputs = {id(node.outputs[0]): node for node in self.nodes}
        self._codes: dict[tuple[int, int, bool, bool], _Levels] = {}

    def reads(self, node: Any, weight: Any, smooth: Any) -> bool:
        """Whether a node multiplies a rounded activation with this value, from the right. smooth: of the weight."""
        if node.op_type != "MatMul" or node.inputs[1] is not weight:
            return False
        rounded = self._outputs.get(id(node.inputs[0]))
        return rounded is not None and _smooth(rounded) is smooth

    def product(self, node: Any, codes: Any, scales: Any) -> None:
        """Put integer arithmetic in a product's place. codes: int8 (K, N). scales: float32 (N,)."""
        rounded = self._outputs[id(node.inputs[0])]
        given = self._quantized(rounded)
        kind = node.inputs[0].dtype or self.ir.DataType.FLOAT

        def add(op: str, inputs: list[Any], **attributes: Any) -> Any:
            return self._add(node, op, inputs, **attributes)

        def multiplied(levels: _Levels) -> Any:
            if levels.rows is None:
                counted = add("MatMulInteger", [levels.codes, codes, levels.zero])
                counted = add("Cast", [counted], to=int(self.ir.DataType.FLOAT))
                return add("Mul", [counted, add("Mul", [levels.step, scales])])
            # The step is a constant, with which onnxruntime fuses a product of this form alone.
            weight = add("DequantizeLinear", [codes, scales], axis=1)
            return add("MatMul", [self._level(node, levels), weight])

        value = multiplied(given)
        if given.left is not None:
            value = add("Add", [value, multiplied(given.left)])
        if given.rows is not None:
            value = add("Mul", [value, given.rows])
        if kind != self.ir.DataType.FLOAT:
            value = add("Cast", [value], to=int(kind))
        take_over(self.model, node, value)

    def finish(self) -> None:
        """What is left reads floats."""
        for node in self.nodes:
            if node.outputs[0].uses() or node.outputs[0].is_graph_output():
                given = self._quantized(node)
                value = self._floats(node, given)
                if given.rows is not None:
                    value = self._add(node, "Mul", [value, given.rows])
                if (smooth := _smooth(node)) is not None:
                    value = self._add(node, "Mul", [value, self._wide(node, smooth)])
                kind = node.inputs[0].dtype or self.ir.DataType.FLOAT
                if kind != self.ir.DataType.FLOAT:
                    value = self._add(node, "Cast", [value], to=int(kind))
                take_over(self.model, node, value)
            else:
                self.model.graph.remove(node, safe=True)

    def _quantized(self, node: Any) -> _Levels:
        x, smooth = node.inputs[0], _smooth(node)
        per_token, twice = (bool(node.attributes[name].as_int()) for name in ("per_token", "twice"))
        key = id(x), id(smooth), per_token, twice
        if key not in self._codes:
            wide = self._wide(node, x)
            if smooth is not None:
                wide = self._divide(node, wide, self._wide(node, smooth))
            found = self._rows(node, wide) if per_token else self._whole(node, wide)
            self._codes[key] = replace(found, left=self._left(node, found)) if twice else found
        return self._codes[key]

    def _whole(self, node: Any, wide: Any) -> _Levels:
        made = self.ir.node("DynamicQuantizeLinear", [wide], num_outputs=3)
        made.metadata_props.update(node.metadata_props)
        self.model.graph.insert_before(node, [made])
        return _Levels(wide, *made.outputs)

    def _rows(self, node: Any, wide: Any) -> _Levels:
        """A scale for each row."""
        last = self._constant("last", np.array([-1], dtype=np.int64))
        top, bottom = (self._add(node, op, [wide, last], keepdims=1) for op in ("ReduceMax", "ReduceMin"))
        smallest = self._constant("smallest", np.float32(SMALLEST))
        rows = self._add(node, "Max", [top, self._add(node, "Neg", [bottom]), smallest])
        step = self._constant("step", np.float32(STEP))
        return self._coded(node, self._divide(node, wide, rows), step, rows)

    def _divide(self, node: Any, value: Any, by: Any) -> Any:
        """By the reciprocal of what is small or constant: a division takes a CPU as long as a dozen products."""
        return self._add(node, "Mul", [value, self._add(node, "Reciprocal", [by])])

    def _left(self, node: Any, given: _Levels) -> _Levels:
        left = self._add(node, "Sub", [given.wide, self._level(node, given)])
        if given.rows is not None:
            return self._coded(node, left, self._constant("finer_step", np.float32(STEP * FINER)), given.rows)
        finer = self._constant("finer", np.float32(FINER))
        return self._coded(node, left, self._add(node, "Mul", [given.step, finer]))

    def _coded(self, node: Any, wide: Any, step: Any, rows: Any = None) -> _Levels:
        """onnxruntime has fast products of uint8 with int8: zero is 128."""
        zero = self._constant("zero", np.uint8(128))
        return _Levels(wide, self._add(node, "QuantizeLinear", [wide, step, zero]), step, zero, rows)

    def _floats(self, node: Any, given: _Levels) -> Any:
        """What all codes stand for; divided by rows, where there are such."""
        value = self._level(node, given)
        return value if given.left is None else self._add(node, "Add", [value, self._level(node, given.left)])

    def _level(self, node: Any, given: _Levels) -> Any:
        return self._add(node, "DequantizeLinear", [given.codes, given.step, given.zero])

    def _constant(self, name: str, value: Any) -> Any:
        full, held = f"surgery.round_activation.{name}", self.model.graph.initializers
        if full not in held:
            made = self.ir.Value(name=full, const_value=self.ir.tensor(np.asarray(value)))
            made.shape, made.type = made.const_value.shape, self.ir.TensorType(made.const_value.dtype)
            self.model.graph.register_initializer(made)
        return held[full]

    def _wide(self, node: Any, value: Any) -> Any:
        """The value as fp32."""
        if (value.dtype or self.ir.DataType.FLOAT) == self.ir.DataType.FLOAT:
            return value
        return self._add(node, "Cast", [value], to=int(self.ir.DataType.FLOAT))

    def _add(self, anchor: Any, op: str, inputs: list[Any], **attributes: Any) -> Any:
        made = self.ir.node(op, inputs, attributes=attributes)
        made.metadata_props.update(anchor.metadata_props)
        self.model.graph.insert_before(anchor, [made])
        return made.outputs[0]


def _smooth(node: Any) -> Any:
    return node.inputs[1] if len(node.inputs) > 1 else None


def take_over(model: Any, node: Any, value: Any) -> None:
    """Let a value have the place, the name and the provenance of what a node gives, which goes."""
    old = node.outputs[0]
    name, value.type, value.shape = old.name, old.type, old.shape
    value.producer().metadata_props.update(node.metadata_props)
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    value.name = name  # an output of the model keeps its own
