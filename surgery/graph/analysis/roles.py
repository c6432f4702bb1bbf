"""Roles of the weight ops in a model, derived from the dataflow and never from names.

    attn.q attn.k attn.v attn.out    projections of an attention, self or cross; fused: attn.qkv, attn.kv, attn.qk
                                     (targets select those of cross-attentions as cross.q, …)
    attn.q.a attn.q.b                first and second factor of a low-rank projection, likewise attn.kv.a, ...
        attn.bias                        produces a term of the scores: relative position tables, their gates
        attn.mix attn.gate               mixes the heads of the scores (talking heads); gates the attention's result
        mlp.up mlp.gate mlp.down         up and down around a nonlinearity; the gate is the factor that has it
        mlp.gate_up mlp.router           gate and up fused; selects experts. Stacked experts have the same roles
    linear_attn.q linear_attn.k linear_attn.v linear_attn.out    of a linear attention; fused: linear_attn.qkv
        linear_attn.decay linear_attn.beta linear_attn.gate      forget gate, update rate, gate of the result
    ssm.in ssm.out ssm.x ssm.dt      projections of a state space (Mamba): into it, out of it, to B, C and the step size
    embed.token embed.position embed.type embed.patch
    head head.dense                  feeds an output of the model; feeds the head only
        norm conv linear embed           all other ops, by kind

Convolutions take the roles of attention, patch embeddings and (1×1) heads; all others are `conv`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.graph.analysis.attention import Attention, find_attentions
from surgery.graph.analysis.dataflow import NONLINEAR, Dataflow, op_name, trace_origins
from surgery.graph.analysis.parts import Rows, find_parts
from surgery.graph.analysis.recurrence import Recurrence, find_recurrences
from surgery.graph.marks import mark_of
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, Call, arguments

# An embedding that an input indexes and that has at most this many rows holds types (segments).
_FEW_TYPES = 16


@dataclass(frozen=True)
class Roles:
    """Roles and attentions of a graph.

    Attributes:
        role: role of every weight op.
        attentions: all attentions, in graph order.
        parts: for fused projections, output features (rows of the weight) by part name ("q", "k", "v").
    """

    role: dict[fx.Node, str]
    attentions: list[Attention]
    parts: dict[fx.Node, Rows] = field(default_factory=dict)

    @property
    def crossing(self) -> set[fx.Node]:
        """The weight ops of cross-attentions that no self-attention uses."""
        found: dict[bool, set[fx.Node]] = {True: set(), False: set()}
        for attention in self.attentions:
            nodes = (*attention.letters(), *attention.out, *attention.bias, *attention.mix, *attention.gate)
            found[attention.cross].update(nodes)
        return found[True] - found[False]


def find_roles(graph: fx.Graph, calls: Sequence[Call], flow: Dataflow | None = None) -> Roles:
    """Find the role of every weight op; linear in the size of the graph.

    Args:
        graph: graph to search.
        calls: weight ops of the graph.
        flow: dataflow of these calls, if it has been computed already.
    """
    flow = flow or trace_origins(graph.nodes, calls)
    attentions = find_attentions(flow)
    role: dict[fx.Node, str] = {}
    # The order matters: a later rule never overrides a role that an earlier, more specific one has set.
    parts = _attention_roles(flow, attentions, role)
    parts |= _recurrence_roles(flow, role)
    _router_roles(flow, role)
    _head_roles(flow, graph, role)
    _mlp_roles(flow, role)
    _embedding_roles(flow, role)
    for call in calls:
        role.setdefault(call.node, "embed" if call.kind == EMBEDDING else _plain(call.kind))
        recorded = mark_of(call.node).role
        if recorded:  # The pass that inserted the op has recorded its role.
            role[call.node] = recorded
            parts.pop(call.node, None)
    return Roles(role, attentions, parts)


def _plain(kind: str) -> str:
    return LINEAR if kind == EXPERTS else kind


def _attention_roles(
    flow: Dataflow, attentions: Sequence[Attention], role: dict[fx.Node, str]
) -> dict[fx.Node, Rows]:
    letters: dict[fx.Node, set[str]] = {}
    serves: dict[fx.Node, list[Attention]] = {}
    for attention in attentions:
        for node, made in attention.letters().items():
            letters.setdefault(node, set()).update(made)
            serves.setdefault(node, []).append(attention)
    # Collected first: `_low_rank` adds first factors to `letters`, which serve several operands but are not fused.
    fused = [node for node, made in letters.items() if len(made) > 1]
    factors = _low_rank(flow, letters, serves)
    for node, made in letters.items():
        base = "attn." + "".join(letter for letter in "qkv" if letter in made)
        role[node] = base + factors.get(node, "")
    weights = {flow.calls[n].weight.target: r for n, r in role.items() if flow.calls[n].weight is not None}  # type: ignore[union-attr]
    for attention in attentions:
        for node in attention.out:
            role.setdefault(node, "attn.out")
        for node in attention.mix:
            role.setdefault(node, "attn.mix")
        for node in attention.gate:
            role.setdefault(node, "attn.gate")
        for node in attention.bias:
            # DeBERTa projects relative positions with the weights of q and k. One weight has only one role.
            weight = flow.calls[node].weight
            role.setdefault(node, weights.get(weight.target, "attn.bias") if weight else "attn.bias")
    found = {node: find_parts(flow, node, serves[node]) for node in fused if node in serves}
    return {node: rows for node, rows in found.items() if rows is not None and len(rows) > 1}


def _recurrence_roles(flow: Dataflow, role: dict[fx.Node, str]) -> dict[fx.Node, Rows]:
    """Assign the roles of state spaces (`ssm.*`) and of linear attentions (`linear_attn.*`).

    Returns:
        Rows of the parts of fused projections of linear attentions.
    """
    letters: dict[fx.Node, set[str]] = {}
    serves: dict[fx.Node, list[Recurrence]] = {}
    for found in find_recurrences(flow):
        family = "ssm" if found.is_state_space else "linear_attn"
        for node, made in found.letters().items():
            if family == "ssm":
                role.setdefault(node, f"ssm.{_state_space_part(made)}")
            else:
                letters.setdefault(node, set()).update(made)
                serves.setdefault(node, []).append(found)
        for node in found.out:
            role.setdefault(node, f"{family}.out")
    parts: dict[fx.Node, Rows] = {}
    for node in [node for node, made in letters.items() if len(made) > 1]:
        # Separate projections may be concatenated before one convolution, so the dataflow alone cannot tell them apart.
        rows = find_parts(flow, node, serves[node], mixed=True)
        if rows is not None and len(rows) == 1:
            letters[node] = set(rows)
        elif rows is not None:
            parts[node] = rows
    factors = _low_rank(flow, letters, serves)
    for node, made in letters.items():
        fused = "".join(letter for letter in "qkv" if letter in made)
        # A projection that makes several others has the name of the first of them.
        name = fused or next(other for other in ("decay", "beta", "gate") if other in made)
        role.setdefault(node, f"linear_attn.{name}{factors.get(node, '')}")
    return parts


def _state_space_part(made: set[str]) -> str:
    """Name of a projection by the operands it makes: Mamba 1 has three of them, Mamba 2 one for all."""
    if "decay" in made and not made & {"q", "k"}:
        return "dt"
    if made & {"q", "k"} and "v" not in made:
        return "x"
    return "in"


def _low_rank(
    flow: Dataflow,
    letters: dict[fx.Node, set[str]],
    serves: Mapping[fx.Node, Sequence[Attention | Recurrence]],
) -> dict[fx.Node, str]:
    """Find low-rank projections: factors of one attention whose input another factor makes (DeepSeek's q_a, q_b).

    First factors are added to `letters`.

    Returns:
        Suffix of the role (".a" or ".b") by factor.
    """
    factors: dict[fx.Node, str] = {}
    for second in list(letters):
        firsts = flow.of(flow.calls[second].x)
        if _size(flow.calls[second], "i") >= _size(flow.calls[second], "o"):
            # Not narrower at the input (MobileBERT's bottleneck): this changes the width of the stream and has no rank.
            continue
        users = {n for attention in serves[second] for n in (*attention.letters(), *attention.core)}
        if not firsts or not all(flow.is_projection(n) and flow.calls[n].kind == LINEAR for n in firsts):
            continue
        # If another op reads the first factor too, it is a shared projection and not part of this one.
        if not all(user in users for first in firsts for user in flow.uses[first]):
            continue
        factors[second] = ".b"
        for first in firsts:
            factors[first] = ".a"
            letters.setdefault(first, set()).update(letters[second])
    return factors


def _router_roles(flow: Dataflow, role: dict[fx.Node, str]) -> None:
    """Assign `mlp.router` to the linear ops that the indices of the selected experts are computed from."""
    for call in flow.calls.values():
        if call.gather is not None:
            for node in flow.expanded(flow.of(call.gather)):
                if node in flow.calls and flow.calls[node].kind == LINEAR:
                    role.setdefault(node, "mlp.router")


def _head_roles(flow: Dataflow, graph: fx.Graph, role: dict[fx.Node, str]) -> None:
    output = graph.output_node()
    heads = []
    for value in output.all_input_nodes:
        for node in flow.projections(value):
            call = flow.calls[node]
            if node not in role and (call.kind == LINEAR or _is_pointwise(call)):
                role[node] = "head"
                heads.append(node)
    for head in heads:
        chain = list(_dense_chain(flow, head, role))
        # By this rule a plain MLP would be all head, so the role is not used there.
        if chain and not any(n.op == "placeholder" for n in flow.of(flow.calls[chain[-1]].x)):
            role.update(dict.fromkeys(chain, "head.dense"))


def _dense_chain(flow: Dataflow, head: fx.Node, role: dict[fx.Node, str]) -> Iterable[fx.Node]:
    node = head
    while True:
        origins = flow.of(flow.calls[node].x)
        if len(origins) != 1:
            return
        node = next(iter(origins))
        call = flow.calls.get(node)
        if call is None or call.kind != LINEAR or node in role:
            return
        yield node


def _mlp_roles(flow: Dataflow, role: dict[fx.Node, str]) -> None:
    for down, call in flow.calls.items():
        if call.kind not in (LINEAR, EXPERTS) or down in role:
            continue
        origins = flow.projections(call.x)
        # An origin that is not a projection means that the input is not the product of an MLP's up and gate.
        if not origins or len(origins) != len(flow.expanded(flow.of(call.x))):
            continue
        if any(flow.calls[n].kind == CONV or not _may_be(role, n, "mlp.") for n in origins):
            continue
        gates = [n for n, flags in origins.items() if flags & NONLINEAR]
        ups = [n for n in origins if n not in gates]
        # Without a nonlinearity two linear ops are a low-rank map, not an MLP.
        if not gates or any(_feeds_a_product(flow, n) for n in origins):
            continue
        role[down] = "mlp.down"
        alone = "mlp.gate_up" if _size(flow.calls[gates[0]], "o") == 2 * _size(call, "i") else "mlp.up"
        _set(role, gates, "mlp.gate" if ups else alone)
        _set(role, ups, "mlp.up")


def _feeds_a_product(flow: Dataflow, node: fx.Node) -> bool:
    """True if the op's output enters a product of activations, as the input of a state-space scan does."""
    return any(user in flow.products for user in flow.uses.get(node, ()))


def _may_be(role: dict[fx.Node, str], node: fx.Node, prefix: str) -> bool:
    return role.get(node, prefix).startswith(prefix)


def _set(role: dict[fx.Node, str], nodes: Iterable[fx.Node], name: str) -> None:
    for node in nodes:
        role.setdefault(node, name)


def _size(call: Call, letter: str) -> int:
    """Return the input ("i") or output ("o") features of a linear or experts op; 0 if unknown."""
    value = call.weight.meta.get("val") if call.weight is not None else None
    if isinstance(value, torch.Tensor) and letter in call.layout:
        return int(value.shape[call.layout.index(letter)])
    value = (call.x if letter == "i" else call.node).meta.get("val")
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) else 0


def _embedding_roles(flow: Dataflow, role: dict[fx.Node, str]) -> None:
    """Assign the roles of embeddings.

    Embeddings that are summed form a group. The largest of them that an input indexes holds the tokens.
    """
    groups: dict[fx.Node, list[Call]] = {}
    for call in flow.calls.values():
        if call.kind == EMBEDDING and call.node not in role:
            groups.setdefault(_sum_of(flow, call.node), []).append(call)
        elif call.kind in (CONV, LINEAR) and call.node not in role and _is_patch(flow, call):
            role[call.node] = "embed.patch"
    largest = max(
        (_rows(c) for group in groups.values() for c in group if _indexed_by_input(flow, c)), default=0
    )
    for group in groups.values():
        given = [call for call in group if _indexed_by_input(flow, call)]
        token = max(given, key=_rows, default=None)
        if token is not None and _rows(token) <= _FEW_TYPES < largest:
            token = None  # Types that are added after the tokens (MobileBERT).
        for call in group:
            if token is not None and (call is token or call.weight is token.weight):
                role[call.node] = "embed.token"
            elif _rows(call) <= _FEW_TYPES and (call in given or _is_uniform(call.x)):
                role[call.node] = "embed.type"
            else:
                role[call.node] = "embed.position"


def _sum_of(flow: Dataflow, node: fx.Node) -> fx.Node:
    """Return the largest sum of embeddings and constants that contains this embedding."""
    while True:
        sums = [n for n in flow.uses.get(node, ()) if n in flow.junctions]
        inner = flow.expanded({sums[0]: 0}) if sums else {}
        if not inner or not all(n in flow.calls and flow.calls[n].kind == EMBEDDING for n in inner):
            return node
        node = sums[0]


def _indexed_by_input(flow: Dataflow, call: Call) -> bool:
    """True if the indices are an input itself; indices counted along the sequence are positions."""
    node = call.x
    for _ in range(32):
        if node.op == "placeholder":
            return True
        if node.op != "call_function" or op_name(node.target) in ("cumsum", "arange") or not node.args:
            return False
        below = node.args[0]
        if not isinstance(below, fx.Node):
            return False
        node = below
    return False


def _is_uniform(node: fx.Node) -> bool:
    """True if all indices are equal: token types that the caller has not passed."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if op_name(node.target) in ("zeros_like", "full_like", "ones_like"):
            return True
        node = node.args[0]
    if node.op == "get_attr":
        owner: Any = node.graph.owning_module
        for name in str(node.target).split("."):
            owner = getattr(owner, name, None)
        held = isinstance(owner, torch.Tensor) and owner.device.type != "meta"
        return held and type(owner) is torch.Tensor and bool((owner == owner.flatten()[0]).all())
    return node.op == "call_function" and op_name(node.target) in ("zeros", "full", "ones")


def _rows(call: Call) -> int:
    value = call.weight.meta.get("val") if call.weight is not None else None
    return int(value.shape[0]) if isinstance(value, torch.Tensor) else 0


def _is_patch(flow: Dataflow, call: Call) -> bool:
    """True for a convolution of the input with windows that do not overlap."""
    if call.kind != CONV or not all(n.op == "placeholder" for n in flow.of(call.x)):
        return False
    kernel, stride = _kernel(call), arguments(call.node).get("stride")
    strides = [stride] if isinstance(stride, int) else list(stride or ())
    strides = strides * len(kernel) if len(strides) == 1 else strides
    return bool(kernel) and max(kernel) > 1 and kernel == strides


def _is_pointwise(call: Call) -> bool:
    return call.kind == CONV and set(_kernel(call)) == {1}


def _kernel(call: Call) -> list[int]:
    value = call.weight.meta.get("val") if call.weight is not None else None
    return list(value.shape[2:]) if isinstance(value, torch.Tensor) else []


__all__ = ["Attention", "Roles", "find_roles"]
