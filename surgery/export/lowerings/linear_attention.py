"""Lowering of `surgery::linear_attention` to LinearAttention: of ONNX from opset 27, of com.microsoft before.

torch.onnx converts a graph to opset 25 at most. The translation therefore emits the node of com.microsoft, which
onnxruntime runs at any opset, and `finish_opset` turns it into the standard one. No op of such a graph changed its
meaning between opset 25 and 27: 26 added BitCast and CumProd, 27 these ops and more types of Range.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.capture.recurrences.operators import linear_attention
from surgery.export.optional import require

DOMAIN, OP = "com.microsoft", "LinearAttention"
OPSET = 27  # the first with LinearAttention
CONVERTED = 25  # the last that torch.onnx converts to


def translation() -> Any:
    """Create the onnxscript function for torch.onnx's translation table."""
    ir = require("onnx_ir")
    op = require("onnxscript").opset18
    own = _operator()

    def lower(
        q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any, rule: str = "linear", scale: float = 1.0
    ) -> Any:
        heads, groups, size = v.shape[2], k.shape[2], k.shape[3]
        if not all(isinstance(number, int) for number in (heads, groups, size, v.shape[3])):
            raise ValueError("linear_attention with a dynamic number of heads or features has no ONNX form")
        kind = q.dtype

        def wide(x: Any) -> Any:
            # The op of surgery computes in float32 whatever its operands are.
            return x if x is None or x.dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)

        def ints(*values: int) -> Any:
            return op.Constant(value_ints=list(values))

        def packed(x: Any, features: int) -> Any:
            return op.Reshape(wide(x), ints(0, 0, features))

        def keys(x: Any) -> Any:
            if groups == heads:
                return packed(x, heads * size)
            # ONNX has one key head for each state, so the heads of a group get copies of theirs.
            each = op.Unsqueeze(wide(x), ints(3))
            return op.Reshape(op.Expand(each, ints(1, 1, 1, heads // groups, 1)), ints(0, 0, heads * size))

        if decay is not None:
            decay = wide(decay) if len(decay.shape) == 3 else packed(decay, heads * size)
        operands = [keys(q), keys(k), packed(v, heads * v.shape[3]), wide(state), decay, wide(beta)]
        # Trailing optional inputs have to be omitted; only inner ones may be empty.
        while operands[-1] is None:
            operands.pop()
        out, last = own(
            *operands, q_num_heads=heads, kv_num_heads=heads, update_rule=rule, scale=float(scale)
        )
        out = op.Reshape(out, ints(0, 0, heads, v.shape[3]))
        return (out if kind == ir.DataType.FLOAT else op.Cast(out, to=kind)), last

    return lower


def _operator() -> Any:
    """LinearAttention of com.microsoft as an onnxscript op."""
    values, defs = require("onnxscript").values, require("onnx").defs
    given, kinds = defs.OpSchema.FormalParameter, defs.OpSchema.AttrType
    optional = defs.OpSchema.FormalParameterOption.Optional
    schema = defs.OpSchema(
        OP,
        DOMAIN,
        1,
        inputs=[
            *(given(name, "T") for name in ("query", "key", "value")),
            *(given(name, "T", param_option=optional) for name in ("past_state", "decay", "beta")),
        ],
        outputs=[given("output", "T"), given("present_state", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            defs.OpSchema.Attribute("q_num_heads", kinds.INT, ""),
            defs.OpSchema.Attribute("kv_num_heads", kinds.INT, ""),
            defs.OpSchema.Attribute("update_rule", kinds.STRING, ""),
            defs.OpSchema.Attribute("scale", kinds.FLOAT, ""),
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), OP, schema)


def opset_for(graph: fx.Graph) -> int | None:
    """The opset whose standard op a graph needs; None if it has no recurrence."""
    return OPSET if any(node.target is linear_attention._opoverload for node in graph.nodes) else None


def finish_opset(model: Any, opset: int | None) -> None:
    """Give a translated onnx_ir.Model an opset later than torch.onnx's, and its recurrences their standard op."""
    if opset is None or opset <= CONVERTED:
        return
    model.opset_imports[""] = opset
    if opset < OPSET:
        return
    for node in model.graph:
        if (node.domain, node.op_type) == (DOMAIN, OP):
            node.domain = ""
            node.version = None
    if all(node.domain != DOMAIN for node in model.graph):
        model.opset_imports.pop(DOMAIN, None)
