"""Finds the attentions of a graph: the core ops, and the weight ops that produce q, k, v, score bias and output.

The core of an attention is either one op (scaled_dot_product_attention, flex_attention) or two products of
activations with a softmax between them: scores = q kᵀ, then softmax(scores) v. Scale, mask, bias, dropout,
sinks, soft caps and "talking heads" (a linear map over the heads) may lie in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from surgery.graph.analysis.dataflow import NONLINEAR, SOFTMAX, Dataflow, Origins, op_name
from surgery.graph.ops import CONV, EXPERTS, LINEAR, arguments

# Most weight ops between the scores and the values: one before the softmax, one after it.
_MOST_MIXING = 2


@dataclass(frozen=True)
class Attention:
    """One attention and the weight ops around it.

    In a low-rank chain, q, k, v and out hold the factor next to the core.

    Attributes:
        core: the attention op, or the score product, the softmax and the product with the values.
        operands: nodes of q, k and v as the core reads them.
        q: weight ops that produce the queries.
        k: weight ops that produce the keys.
        v: weight ops that produce the values.
        out: weight ops that read the result.
        cross: True if the keys come from another stream than the queries.
        bias: weight ops that produce a term added to the scores.
        mix: weight ops that mix the heads of the scores.
        gate: weight ops that gate the output.
    """

    core: tuple[fx.Node, ...]
    operands: dict[str, fx.Node]
    q: tuple[fx.Node, ...]
    k: tuple[fx.Node, ...]
    v: tuple[fx.Node, ...]
    out: tuple[fx.Node, ...] = ()
    cross: bool = False
    bias: tuple[fx.Node, ...] = ()
    mix: tuple[fx.Node, ...] = ()
    gate: tuple[fx.Node, ...] = ()

    def letters(self) -> dict[fx.Node, set[str]]:
        """Map each weight op to the operands ("q", "k", "v") that it produces."""
        found: dict[fx.Node, set[str]] = {}
        for letter, nodes in (("q", self.q), ("k", self.k), ("v", self.v)):
            for node in nodes:
                found.setdefault(node, set()).add(letter)
        return found


@dataclass
class _Scores:
    """Nodes found behind an operand that may hold attention weights: products, head mixers and the rest."""

    products: dict[fx.Node, None]
    mix: dict[fx.Node, None]
    others: dict[fx.Node, None]


def find_attentions(flow: Dataflow) -> list[Attention]:
    """Find all attentions, in graph order."""
    products = set(flow.products)
    found = []
    for node in flow.products:
        attention = _of_op(flow, node) if _is_attention(node) else _of_products(flow, node, products)
        if attention is not None:
            found.append(attention)
    # Outputs come last: one attention's result may be added to another's, so all cores must be known first.
    cores = {attention.core[-1] for attention in found}
    return [_with_output(flow, attention, cores) for attention in found]


def _is_attention(node: fx.Node) -> bool:
    name = op_name(node.target)
    return "attention" in name and name != "linear_attention"


def _of_op(flow: Dataflow, node: fx.Node) -> Attention | None:
    args = arguments(node)
    operands = [args.get(name) for name in ("query", "key", "value")]
    # Third-party attention ops may name their arguments differently; q, k, v then come first by convention.
    if None in operands:
        operands = list(node.args[:3])
    mask: Any = args.get("attn_mask", args.get("attn_bias"))
    q, k, v = operands
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)):
        return None
    # A mask may be a learned position bias, so its weight ops are candidates for `attn.bias`.
    others = dict.fromkeys(flow.expanded(flow.of(mask)))
    sources = [*others, *(flow.aside.get(mask, ()) if isinstance(mask, fx.Node) else ())]
    return _attention(flow, (node,), {"q": q, "k": k, "v": v}, sources)


def _of_products(flow: Dataflow, node: fx.Node, products: set[fx.Node]) -> Attention | None:
    """Return the attention whose product with the values is this node, or None."""
    pair = product_operands(node)
    # Either factor may hold the attention weights: models that keep channels first compute v softmax(scores)ᵀ.
    for weights, values in (pair, pair[::-1]) if pair else ():
        scores = _Scores({}, {}, {})
        _search(flow, flow.of(weights), products, scores, False, _MOST_MIXING)
        main = _main_product(flow, scores.products)
        if main is None or values is weights:
            continue
        q, k = _query_and_key(flow, main)
        # With talking heads the softmax reads the mixing op, not the score product itself.
        softmax = flow.softmax.get(main) or next(
            (flow.softmax[n] for n in scores.mix if n in flow.softmax), None
        )
        core = (main, softmax, node) if softmax is not None else (main, node)
        sources = [*scores.others, *flow.aside.get(weights, ())]
        # baddbmm(bias, q, kᵀ) adds its first argument to the scores.
        if op_name(main.target) == "baddbmm" and isinstance(main.args[0], fx.Node):
            sources += [*flow.expanded(flow.of(main.args[0])), *flow.aside.get(main.args[0], ())]
        # Other products are score terms as well, such as DeBERTa's content-to-position products.
        sources += [other for other in scores.products if other is not main]
        return _attention(flow, core, {"q": q, "k": k, "v": values}, sources, tuple(scores.mix))
    return None


def product_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the two factors of a product of two activations, or None if the node is not one."""
    name = op_name(node.target)
    if name == "einsum":
        factors = node.args[1]
    elif name == "baddbmm":
        factors = node.args[1:3]
    elif name in ("matmul", "mm", "bmm"):
        factors = node.args[:2]
    else:
        return None
    if not isinstance(factors, (list, tuple)) or len(factors) != 2:
        return None
    left, right = factors
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def _search(
    flow: Dataflow, origins: Origins, products: set[fx.Node], scores: _Scores, soft: bool, mixing: int
) -> bool:
    """Collect the products that a softmax separates from a value.

    Args:
        flow: dataflow of the graph.
        origins: origins of the value.
        products: all products of two activations.
        scores: receives the nodes that are found.
        soft: True if a softmax lies between the value and these origins.
        mixing: number of weight ops that the search may still pass through.

    Returns:
        True if a product was found.
    """
    hit = False
    # A junction hides its terms (scores + bias), so it is opened to look at each of them.
    opened = flow.expanded(origins) if any(n in flow.junctions for n in origins) else origins
    for node, flags in opened.items():
        softened = soft or bool(flags & SOFTMAX)
        call = flow.calls.get(node)
        if node in products:
            # A product that no softmax follows is an ordinary matrix product, not attention scores.
            if softened and not _is_attention(node):
                scores.products[node] = None
                hit = True
        elif mixing and call is not None and call.kind in (LINEAR, CONV, EXPERTS):
            inner = flow.of(call.x)
            # A sum before the weight op is a residual stream: the op does not mix heads, it starts another path.
            if not any(n in flow.junctions for n in inner) and _search(
                flow, inner, products, scores, softened, mixing - 1
            ):
                scores.mix[node] = None
                hit = True
            else:
                scores.others[node] = None
        else:
            scores.others[node] = None
    return hit


def _main_product(flow: Dataflow, products: dict[fx.Node, None]) -> fx.Node | None:
    """Return the product of queries and keys: the first of the products whose factors both depend on the input."""
    usable = [n for n in products if product_operands(n)]
    both = [n for n in usable if not any(o in flow.constant for o in product_operands(n) or ())]
    # DeBERTa has several such products (content to position as well); content to content comes first in the graph.
    return min(both or usable, key=flow.order.__getitem__, default=None)


def _query_and_key(flow: Dataflow, product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the factors of a score product as (query, key).

    The softmax runs over the keys, so the key is the factor that holds the axis of the softmax.
    """
    left, right = product_operands(product) or (product, product)
    softmax = flow.softmax.get(product)
    axis = arguments(softmax).get("dim", -1) if softmax is not None else -1
    value = product.meta.get("val")
    rank = value.dim() if value is not None else 0
    # Count the axis from the end: the softmax may see the scores with other leading axes than the product.
    axis = axis - rank if axis >= 0 else axis
    if op_name(product.target) == "einsum":
        equation = str(product.args[0]).replace(" ", "")
        inputs, _, output = equation.partition("->")
        first, _, second = inputs.partition(",")
        letter = output[axis] if len(output) >= -axis else ""
        return (right, left) if letter in first and letter not in second else (left, right)
    return (right, left) if axis == -2 else (left, right)


def _attention(
    flow: Dataflow,
    core: tuple[fx.Node, ...],
    operands: dict[str, fx.Node],
    score_terms: list[fx.Node],
    mix: tuple[fx.Node, ...] = (),
) -> Attention | None:
    made = {letter: makers(flow, operand) for letter, operand in operands.items()}
    if not any(made.values()):
        return None
    own = {node for nodes in made.values() for node in nodes} | set(mix)
    bias = tuple(n for n in _with_constant_part(flow, score_terms) if n not in own)
    cross = not _same_stream(flow, made["q"], made["k"])
    return Attention(core, operands, made["q"], made["k"], made["v"], (), cross, bias, mix)


def makers(flow: Dataflow, operand: Any) -> tuple[fx.Node, ...]:
    """Return the weight ops that produce an operand."""
    found = flow.projections(operand)
    # A projection that is read through a softmax only weights the others (a router of projections).
    direct = [node for node, flags in found.items() if not flags & SOFTMAX]
    return tuple(direct or found)


def _with_constant_part(flow: Dataflow, origins: list[fx.Node]) -> Iterator[fx.Node]:
    """Yield the weight ops among the origins and, while these depend on positions alone, the weight ops behind them.

    In a product of queries and positions, only the position factor is followed.
    """
    stack, seen = list(origins), set[fx.Node]()
    while stack and len(seen) < 64:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(flow.junctions.get(node, ()))
        for operand in product_operands(node) or () if node.op == "call_function" else ():
            if operand in flow.constant:
                stack.extend(flow.of(operand))
        call = flow.calls.get(node)
        if call is not None:
            yield node
            # An op that depends on an input ends the walk: weight ops before it belong to the stream.
            if node in flow.constant:
                stack.extend(flow.of(call.x))


def _same_stream(flow: Dataflow, queries: tuple[fx.Node, ...], keys: tuple[fx.Node, ...]) -> bool:
    if not queries or not keys or set(queries) & set(keys):
        return True
    return bool(_streams(flow, queries) & _streams(flow, keys))


def _streams(flow: Dataflow, projections: tuple[fx.Node, ...]) -> set[fx.Node | None]:
    """Return the values that projections read, and those behind them through convolutions and low-rank maps."""
    found: set[fx.Node | None] = set()
    stack = list(projections)
    while stack and len(found) < 16:
        origins = flow.of(flow.calls[stack.pop()].x)
        # No origin at all means zeros: the first decoder layer of DETR starts from them.
        found |= set(origins) or {None}
        # Keys may be computed by spatial reduction (a convolution) or a low-rank map of the queries' stream.
        stack.extend(n for n in origins if flow.is_projection(n))
    return found


def _with_output(flow: Dataflow, attention: Attention, cores: set[fx.Node]) -> Attention:
    """Add the output projection and the gates."""
    own = {*attention.q, *attention.k, *attention.v}
    out, gates = readers(flow, attention.core[-1], own, cores)
    return replace(attention, out=out, gate=gates)


def readers(
    flow: Dataflow, result: fx.Node, own: set[fx.Node], cores: set[fx.Node]
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """Find the weight ops that read the result of an attention or a recurrence.

    Args:
        flow: dataflow of the graph.
        result: the node of the result.
        own: weight ops that make the operands.
        cores: nodes of the results of all attentions or recurrences.

    Returns:
        The output projections, and the weight ops that gate the result before these.
    """
    out: dict[fx.Node, None] = {}
    gates: dict[fx.Node, None] = {}
    for user in flow.uses.get(result, ()):
        users = [user]
        if user in flow.junctions:
            # Terms that may be added to the result before its projection: the queries, a convolution of the
            # values, another attention. With any other term the sum is the residual stream.
            rest = set(flow.expanded(flow.junctions[user])) - own - cores
            users = [] if rest else flow.uses.get(user, [])
        for n in users:
            if flow.is_projection(n) and n not in own:
                out[n] = None
                gates.update(_gates(flow, flow.of(flow.calls[n].x), own | cores))
    return tuple(out), tuple(gates)


def _gates(flow: Dataflow, origins: Origins, known: set[fx.Node]) -> dict[fx.Node, None]:
    return {
        n: None
        for n, flags in origins.items()
        if flags & NONLINEAR and n not in known and flow.is_projection(n)
    }
