"""Origins of values: for every node, the nearest weight ops and products behind it, found in one forward sweep.

Roles and attentions are found by asking which weight ops feed a value. Walking back from each value would be
quadratic. Instead, each node gets its *origins*: a small dict of the nearest nodes that produced its value. Views,
rotary embeddings, norms, scaling and activations are looked through. An origin is

- a weight op (linear, convolution, embedding, experts; not a norm, not a depthwise convolution),
- a product of two activations (matmul, einsum, scaled_dot_product_attention),
- a junction: a sum of values with different origins, such as a residual add, which hides the origins behind it, or
- an input, or a parameter used as a value.

If an op combines a value that depends on the inputs with a constant one (position tables, rotary angles, latent
queries), it keeps only the origins of the first. The weight ops behind the constant are recorded in `aside`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from surgery.graph.marks import mark_of
from surgery.graph.ops import CONV, EXPERTS, LINEAR, NORM, Call, is_depthwise

# Flags of an origin, set if any path from it to the value has a pointwise nonlinearity or a softmax.
NONLINEAR, SOFTMAX = 1, 2

Origins = dict[fx.Node, int]

# Levels of dependence: on constants, on integer or flat inputs, on activations. The highest level among an op's
# operands decides its origins.
_CONSTANT, _INPUT, _ACTIVATION = 0, 1, 2
# A union with more origins becomes a junction, which bounds the cost of the sweep.
_MOST_ORIGINS = 8


class Rule(Enum):
    """Rule by which an op derives its origins from those of its arguments."""

    UNION = auto()  # the union over all tensor arguments (default)
    SUM = auto()  # like UNION, but a junction if the arguments differ
    FIRST = auto()  # those of the first argument; the others are indices, sizes or dtypes
    NONLINEAR = auto()
    SOFTMAX = auto()
    PRODUCT = auto()
    NOTHING = auto()  # none: the value is a mask or computed from shapes


_NAMES = {
    Rule.SUM: "add add_ sub sub_ rsub subtract addcmul",
    Rule.FIRST: """index index_select gather take_along_dim embedding type_as expand_as view_as reshape_as
        getitem topk sort repeat repeat_interleave roll masked_select narrow view reshape permute transpose slice
        select unsqueeze squeeze expand contiguous clone split split_with_sizes chunk unbind flatten unflatten
        t numpy_T to _to_copy detach alias dropout dropout_""",
    Rule.NONLINEAR: """gelu gelu_ relu relu_ relu6 silu silu_ sigmoid sigmoid_ tanh tanh_ hardswish hardswish_
        hardsigmoid hardsigmoid_ hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu celu mish mish_
        softplus erf glu prelu rrelu logsigmoid log_sigmoid exp expm1 threshold square sin hardshrink""",
    Rule.SOFTMAX: "softmax _softmax _safe_softmax",
    Rule.PRODUCT: """matmul mm bmm baddbmm einsum scaled_dot_product_attention flex_attention
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention lstm gru
        linear_attention""",
    Rule.NOTHING: """arange zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones
        new_full new_empty scalar_tensor eye linspace rand randn rand_like randn_like eq ne lt le gt ge
        logical_and logical_or logical_not logical_xor isnan isinf isfinite any all sym_size sym_stride
        sym_numel sym_storage_offset numel item _local_scalar_dense is_nonzero""",
}
_RULE_BY_NAME = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def op_name(target: Any) -> str:
    """Return the op's name without namespace and overload, such as "add_" for aten.add_.Tensor."""
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    return getattr(target, "__name__", str(target))


@lru_cache(maxsize=4096)
def rule_of(target: Any) -> Rule:
    """Return the rule of an op; ops that are not listed take the union."""
    return Rule.FIRST if target is operator.getitem else _RULE_BY_NAME.get(op_name(target), Rule.UNION)


@dataclass
class Dataflow:
    """Origins of every node of a graph, built by `trace_origins`.

    Attributes:
        calls: weight ops by node.
        origins: origins of every node that is a tensor.
        junctions: origins that meet in each junction.
        aside: constant weight ops and junctions that were combined into a node on the way from its origins.
        uses: weight ops, products and junctions that read each origin.
        writers: ops that write into a tensor in place, by the tensor's node.
        softmax: softmax that follows each origin.
        products: products of two activations, in graph order.
        order: position of each node in the graph.
        constant: nodes that depend on no input.
    """

    calls: Mapping[fx.Node, Call]
    origins: dict[fx.Node, Origins] = field(default_factory=dict)
    junctions: dict[fx.Node, Origins] = field(default_factory=dict)
    aside: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    uses: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    writers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    softmax: dict[fx.Node, fx.Node] = field(default_factory=dict)
    products: list[fx.Node] = field(default_factory=list)
    order: dict[fx.Node, int] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)

    def of(self, value: Any) -> Origins:
        """Return the origins of a value; empty for a value that is not a tensor."""
        return self.origins.get(value, {}) if isinstance(value, fx.Node) else {}

    def expanded(self, origins: Origins, limit: int = 32) -> Origins:
        """Replace junctions by the origins behind them, up to `limit` nodes."""
        found: Origins = {}
        stack = list(origins.items())
        while stack and len(found) < limit:
            node, flags = stack.pop()
            if node in found:
                continue
            found[node] = flags
            stack.extend((inner, flags | more) for inner, more in self.junctions.get(node, {}).items())
        return {node: flags for node, flags in found.items() if node not in self.junctions}

    def projections(self, value: Any) -> Origins:
        """Return the matrix-like weight ops (linear, conv, experts) among a value's origins.

        A sum is opened only if all its terms are parallel linear ops (W x + B A x). Any other junction is the residual
        stream, and the weight ops behind that did not project this value.
        """
        found: Origins = {}
        for node, flags in self.of(value).items():
            if self.is_projection(node):
                found[node] = flags
            else:
                terms = self.junctions.get(node, {})
                if terms and self._side_by_side(terms):
                    found.update({n: flags | more for n, more in terms.items()})
        return found

    def _side_by_side(self, terms: Origins) -> bool:
        """True if all terms are linear ops and none feeds another (unlike x = W x; x + MLP(x))."""
        if not all(n in self.calls and self.calls[n].kind == LINEAR for n in terms):
            return False
        behind = [n for term in terms for n in self.of(self.calls[term].x)]
        # The walk is limited to four weight ops back, to bound its cost.
        for _ in range(4):
            if any(n in terms for n in behind):
                return False
            behind = [o for n in behind if n in self.calls for o in self.of(self.calls[n].x)]
        return True

    def is_projection(self, node: fx.Node) -> bool:
        """True if a node is a matrix-like weight op: linear, conv or experts."""
        call = self.calls.get(node)
        return call is not None and call.kind in (LINEAR, CONV, EXPERTS)


def trace_origins(nodes: Iterable[fx.Node], calls: Sequence[Call]) -> Dataflow:
    """Compute the origins of all nodes in one sweep in graph order; linear in their number."""
    flow = Dataflow({call.node: call for call in calls})
    rests_on: dict[fx.Node, int] = {}
    inserted: dict[str, fx.Node] = {}
    for position, node in enumerate(nodes):
        flow.order[node] = position
        inserted[node.name] = node
        mark = mark_of(node)
        if mark.gone_for is not None:
            continue  # The node is superseded: nothing runs it, and its readers are superseded as well.
        if mark.aux:
            # A node inserted by an adapter counts as the value that it wraps, or that it feeds on. So an analysis
            # finds the same structure with and without adapters.
            below: Any = inserted.get(mark.wraps or mark.feeds or "")
            below = below or (node.args[0] if mark.input else None)
            if isinstance(below, fx.Node) and below in flow.origins:
                flow.origins[node], rests_on[node] = flow.origins[below], rests_on[below]
            continue
        if node.op == "call_function":
            call = flow.calls.get(node)
            if call is not None and call.kind != NORM and not is_depthwise(call):
                rests_on[node] = _ACTIVATION if rests_on.get(call.x) else _CONSTANT
                flow.origins[node] = {node: 0}
                _note_uses(flow, node, (call.x,))
            else:
                _pass_on(flow, rests_on, node, call)
        elif node.op in ("placeholder", "get_attr"):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            flow.origins[node] = {node: 0}
            # A float input of rank 3 or more is a stream of features; ids, masks and scalars are not.
            stream = value.dtype.is_floating_point and value.dim() >= 3
            rests_on[node] = _CONSTANT if node.op == "get_attr" else _ACTIVATION if stream else _INPUT
    flow.constant = {node for node, level in rests_on.items() if level == _CONSTANT}
    return flow


def _note_uses(flow: Dataflow, user: fx.Node, operands: Iterable[fx.Node]) -> None:
    for operand in operands:
        for origin in flow.origins.get(operand, ()):
            flow.uses.setdefault(origin, []).append(user)


def _pass_on(flow: Dataflow, rests_on: dict[fx.Node, int], node: fx.Node, call: Call | None) -> None:
    rule = rule_of(node.target)
    if call is not None:
        inputs, rule = [call.x], Rule.FIRST
    elif rule is Rule.FIRST:
        first = node.args[0] if node.args else None
        inputs = [first] if isinstance(first, fx.Node) else list(node._input_nodes)
    else:
        inputs = list(node._input_nodes)
    inputs = [n for n in inputs if n in rests_on]
    if not inputs or rule is Rule.NOTHING:
        if isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            flow.origins[node] = {}
            rests_on[node] = _CONSTANT
        return
    level = max([rests_on[n] for n in inputs])
    rests_on[node] = level
    if rule is Rule.PRODUCT:
        flow.origins[node] = {node: 0}
        flow.products.append(node)
        _note_uses(flow, node, inputs)
        return
    leading = [n for n in inputs if rests_on[n] == level]
    # The level decides: the origins of constant operands give way to those of operands that depend on the inputs.
    aside = _aside(flow, inputs, rests_on, level)
    if aside:
        flow.aside[node] = aside
    known = flow.origins
    origins = known[leading[0]]
    if len(leading) > 1:
        # Integers next to floats are indices (index_add, index_put), not values.
        leading = [n for n in leading if _is_float(n)] or leading
        origins = known[leading[0]]
    if len(leading) > 1:
        origins = _combine(flow, node, [known[n] for n in leading], rule)
    if rule is Rule.NONLINEAR:
        origins = {n: flags | NONLINEAR for n, flags in origins.items()}
    elif rule is Rule.SOFTMAX:
        # Opened, so that attention scores are found even if a bias was added to them before the softmax.
        for origin in flow.expanded(origins):
            flow.softmax.setdefault(origin, node)
        origins = {n: flags | SOFTMAX for n, flags in origins.items()}
    known[node] = origins
    if not node.users and op_name(node.target).endswith("_"):
        _write_back(flow, rests_on, node)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)


def _write_back(flow: Dataflow, rests_on: dict[fx.Node, int], node: fx.Node) -> None:
    """Propagate an in-place write (`k[..., :n] = x`) to the tensor and its bases, for nodes that read these later."""
    target, steps = node.args[0], 0
    while isinstance(target, fx.Node) and target in rests_on and steps < 8:
        flow.writers.setdefault(target, []).append(node)
        flow.origins[target] = {**flow.origins[target], **flow.origins[node]}
        rests_on[target] = max(rests_on[target], rests_on[node])
        if target.op != "call_function" or rule_of(target.target) is not Rule.FIRST or not target.args:
            return
        target, steps = target.args[0], steps + 1


def _combine(flow: Dataflow, node: fx.Node, parts: list[Origins], rule: Rule) -> Origins:
    """Return the union of the operands' origins, or the node as a junction if a sum has terms of different origins."""
    parts = [part for part in parts if part]
    if not parts:
        return {}
    first = parts[0]
    if all(part is first or part == first for part in parts):
        return first
    union = dict(first)
    for part in parts[1:]:
        for origin, flags in part.items():
            union[origin] = union.get(origin, 0) | flags
    # A term whose origins are all among the others' is not a new stream: rotary, x·cdf(x), (x - mean)/std.
    differ = rule is Rule.SUM and all(len(part) < len(union) for part in parts)
    if not differ and len(union) <= _MOST_ORIGINS:
        return union
    flow.junctions[node] = union
    for origin in union:
        flow.uses.setdefault(origin, []).append(node)
    return {node: 0}


def _aside(
    flow: Dataflow, inputs: list[fx.Node], rests_on: dict[fx.Node, int], level: int
) -> frozenset[fx.Node]:
    found: frozenset[fx.Node] = frozenset()
    for n in inputs:
        known = flow.aside.get(n)
        if known is not None:
            found |= known
        if level and rests_on[n] == _CONSTANT:
            found |= {o for o in flow.origins[n] if o in flow.calls or o in flow.junctions}
    return found
