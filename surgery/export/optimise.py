"""Simplification of an exported ONNX graph without reading the values of weights.

PyTorch's `optimize=True` folds every constant: names are lost, and A, B and the magnitude of a DoRA are combined into
one matrix. Here the values of weights are hidden while the passes run, so nothing can be folded across them. The
resulting nodes therefore do not depend on the trained values: a merged program has as many nodes as its base.
Afterwards only the transpose of a base weight is folded, into a tensor that names its source.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgery.export import metadata_keys
from surgery.export.optional import require

# The list omits rules that compute new weights (batch norm into a convolution) or test a weight for zeros (an optional
# bias). onnxruntime applies the same rules when it loads the file, which does not change the names in the file.
_RULES = (
    "add_0_rule",
    "cast_cast_rule",
    "cast_constant_of_shape_rule",
    "cast_constant_of_shape_without_value_rule",
    "collapse_slice2_rule",
    "collapse_slice_rule",
    "div_by_1_rule",
    "dropout_inference_rule",
    "dropout_zero_rule",
    "materialize_reshape_shape_rule",
    "mul_by_1_rule",
    "no_op_cast_rule",
    "no_op_dynamic_scatter_nd_rule",
    "no_op_expand_rule",
    "no_op_static_scatter_nd_rule",
    "no_op_transpose_rule",
    "one_reshape_matmul_reshape_rule",
    "reshape_reshape_rule",
    "sub_0_rule",
    "transpose_transpose_rule",
    "two_reshapes_matmul_reshape_rule",
    "unsqueeze_unsqueeze_rule",
)
# Rules whose pattern matches the constant on one side only; the commuted rule matches it on the other side.
_COMMUTING = ("add_0_rule", "mul_by_1_rule")
_FOLD_LIMIT = 1 << 16  # elements: nodes with larger inputs or outputs are not folded
_SHARE_LIMIT = 1024  # elements: larger constants are not merged


def optimise(model: Any, weights: Iterable[str], pinned: Iterable[str]) -> None:
    """Simplify `model` (an onnx_ir.Model) in place.

    Args:
        model: the onnx_ir model.
        weights: names of the initializers whose values must not be read: parameters and tensors with provenance.
        pinned: names of those weights that must not be stored transposed either.
    """
    ir, common = require("onnx_ir"), require("onnx_ir.passes.common")
    folding = require("onnxscript.optimizer")
    initializers = model.graph.initializers
    hidden = {name: initializers[name] for name in weights if name in initializers}
    # Initializers that exist now have a name of the program; constants that the passes add later do not.
    named = set(initializers)
    values = {name: value.const_value for name, value in hidden.items()}
    for value in hidden.values():
        value.const_value = None
    try:
        # The rewrite rules can expose new constants, which a second round folds.
        for _ in range(2):
            before = model.graph.num_nodes()
            folding.fold_constants_ir(
                model, onnx_shape_inference=True, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT
            )
            _rewrite(model)
            common.RemoveUnusedNodesPass()(model)
            if model.graph.num_nodes() == before:
                break
        ir.passes.Sequential(
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
        )(model)
        _share_constants(model, named)
        ir.passes.Sequential(
            common.CommonSubexpressionEliminationPass(),
            common.OutputFixPass(),
            common.NameFixPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        )(model)
    finally:
        for name, value in hidden.items():
            value.const_value = values[name]
    _fold_transposes(model, set(hidden) - set(pinned))


def _rewrite(model: Any) -> None:
    rules = require("onnxscript.rewriter.rules.common")
    # The available rules differ between onnxscript versions. Each only simplifies the graph, so a missing rule is fine.
    chosen = [(name, getattr(rules, name)) for name in _RULES if hasattr(rules, name)]
    commuted = [rule.commute() if name in _COMMUTING else [rule] for name, rule in chosen]
    require("onnxscript.rewriter").RewritePass([rule for group in commuted for rule in group])(model)


def _share_constants(model: Any, named: set[str]) -> None:
    """Merge equal small constants that have no name in the program.

    The pass of onnx_ir is not used, because it would also merge equal weights, such as the zero B of two new LoRAs or
    the zero biases of all norms.

    Args:
        model: the onnx_ir model.
        named: names of initializers that must not be merged.
    """
    seen: dict[tuple[Any, ...], Any] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in named or tensor is None or tensor.size > _SHARE_LIMIT or value.is_graph_output():
            continue
        if tensor.dtype.is_string():
            continue
        kept = seen.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]


def _fold_transposes(model: Any, foldable: set[str]) -> None:
    """Store weights transposed if every use transposes them, and record the name of the source.

    A weight that is also used without a transpose, such as a tied embedding, keeps its Transpose node, because folding
    would store it twice.
    """
    ir = require("onnx_ir")
    for name in sorted(foldable):
        weight = model.graph.initializers.get(name)
        if weight is None or weight.const_value is None or weight.is_graph_output():
            continue
        users = [use.node for use in weight.uses()]
        orders = {_order(node, len(weight.shape)) for node in users}
        if len(orders) != 1 or (order := orders.pop()) is None:
            continue
        folded = _transposed(ir, weight, order)
        if folded.name in model.graph.initializers:
            continue
        model.graph.register_initializer(folded)
        for node in users:
            node.outputs[0].replace_all_uses_with(folded)
            model.graph.remove(node, safe=True)
        del model.graph.initializers[name]


def _order(node: Any, rank: int) -> tuple[int, ...] | None:
    """The permutation of a Transpose node that can be removed; None for any other node."""
    if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return None
    perm = node.attributes.get("perm")
    # Without `perm`, ONNX reverses all axes.
    return tuple(perm.as_ints()) if perm is not None else tuple(reversed(range(rank)))


def _transposed(ir: Any, weight: Any, order: tuple[int, ...]) -> Any:
    """Create the transposed initializer. Its values are computed when the file is written, to save memory."""
    swapped = (*range(len(order) - 2), len(order) - 1, len(order) - 2)
    suffix = "T" if order == swapped else "perm" + "_".join(map(str, order))
    name, tensor = f"{weight.name}.{suffix}", weight.const_value
    shape = ir.Shape([tensor.shape[axis] for axis in order])

    def compute() -> Any:
        return ir.Tensor(tensor.numpy().transpose(order), dtype=tensor.dtype, name=name)

    folded = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=shape,
        const_value=ir.LazyTensor(compute, dtype=tensor.dtype, shape=shape, name=name),
    )
    folded.metadata_props.update(weight.metadata_props)
    folded.metadata_props[metadata_keys.SOURCE] = weight.name
    return folded
