"""`surgery::round_activation` in standard ONNX: DynamicQuantizeLinear and MatMulInteger with the codes of a weight.

onnxruntime makes one kernel of a product and its scales (MatMulIntegerToFloat, or DynamicQuantizeMatMul with the
rounding). What is rounded once is read by all products of it. Whatever else reads the rounded activation gets it
back as floats.
"""

from __future__ import annotations

from typing import Any

from surgery.export.extra import require

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
    )
    own = values.Op(values.Opset(DOMAIN, 1), OP, schema)
    return lambda x, smooth=None: own(x) if smooth is None else own(x, smooth)


class Rounded:
    """The rounded activations of an onnx_ir.Model: `product` for each weight that they meet, `finish` for the rest."""

    def __init__(self, model: Any) -> None:
        self.ir, self.model = require("onnx_ir"), model
        self.nodes = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, OP)]
        self._outputs = {id(node.outputs[0]): node for node in self.nodes}
        self._codes: dict[tuple[int, int], tuple[Any, Any, Any]] = {}

    def reads(self, node: Any, weight: Any, smooth: Any) -> bool:
        """Whether a node multiplies a rounded activation with this value, from the right. smooth: of the weight."""
        if node.op_type != "MatMul" or node.inputs[1] is not weight:
            return False
        rounded = self._outputs.get(id(node.inputs[0]))
        return rounded is not None and _smooth(rounded) is smooth

    def product(self, node: Any, codes: Any, scales: Any) -> None:
        """Put integer arithmetic in a product's place. codes: int8 (K, N). scales: float32 (N,)."""
        rounded = self._outputs[id(node.inputs[0])]
        levels, step, zero = self._quantized(rounded)
        kind = node.inputs[0].dtype or self.ir.DataType.FLOAT

        def add(op: str, inputs: list[Any], **attributes: Any) -> Any:
            return self._add(node, op, inputs, **attributes)

        counted = add("MatMulInteger", [levels, codes, zero])
        value = add(
            "Mul", [add("Cast", [counted], to=int(self.ir.DataType.FLOAT)), add("Mul", [step, scales])]
        )
        if kind != self.ir.DataType.FLOAT:
            value = add("Cast", [value], to=int(kind))
        take_over(self.model, node, value)

    def finish(self) -> None:
        """What is left reads floats."""
        for node in self.nodes:
            if node.outputs[0].uses() or node.outputs[0].is_graph_output():
                levels, step, zero = self._quantized(node)
                value = self._add(node, "DequantizeLinear", [levels, step, zero])
                if (smooth := _smooth(node)) is not None:
                    value = self._add(node, "Mul", [value, self._wide(node, smooth)])
                kind = node.inputs[0].dtype or self.ir.DataType.FLOAT
                if kind != self.ir.DataType.FLOAT:
                    value = self._add(node, "Cast", [value], to=int(kind))
                take_over(self.model, node, value)
            else:
                self.model.graph.remove(node, safe=True)

    def _quantized(self, node: Any) -> tuple[Any, Any, Any]:
        x, smooth = node.inputs[0], _smooth(node)
        key = id(x), id(smooth)
        if key not in self._codes:
            wide = self._wide(node, x)
            if smooth is not None:
                wide = self._add(node, "Div", [wide, self._wide(node, smooth)])
            made = self.ir.node("DynamicQuantizeLinear", [wide], num_outputs=3)
            made.metadata_props.update(node.metadata_props)
            self.model.graph.insert_before(node, [made])
            self._codes[key] = tuple(made.outputs)
        return self._codes[key]

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
