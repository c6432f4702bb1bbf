"""Finding attentions in a graph: their cores, and which weight ops make q, k, v, the scores' bias and the output.

A core is an op that is an attention by itself (scaled_dot_product_attention, flex_attention) or two products of
activations with a softmax between them: scores = q kᵀ, then softmax(scores) v. Scale, mask, bias, dropout,
sinks, soft caps and "talking heads" (a linear map over the heads) may lie in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from surgery.graph.analysis.dataflow import NONLINEAR, SOFTMAX, Dataflow, Origins, op_name
from surgery.graph.ops import CONV, EXPERTS, LINEAR, arguments

_MOST_MIXING = 2  # weight ops between the scores and the values: one before the softmax, one after


@dataclass(frozen=True)
class Attention:
    """One attention.

    core: the op, or the product of scores, the softmax and the product with the values. q, k, v, out: the weight
    ops next to the core on each side (in a low-rank chain the one at the core). operands: the nodes of q, k and
    v at the core. cross: keys come from another stream than queries. bias: weight ops of what is added to the
    scores. mix: weight ops that mix the scores' heads. gate: weight ops that gate the output.
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
        """Which of q, k, v each weight op makes."""
        found: dict[fx.Node, set[str]] = {}
        for letter, nodes in (("q", self.q), ("k", self.k), ("v", self.v)):
            for node in nodes:
                found.setdefault(node, set()).add(letter)
        return found


@dataclass
class _Scores:
    """What lies behind the operand of a product that may hold attention weights."""

    products: dict[fx.Node, None]
    mix: dict[fx.Node, None]
    others: dict[fx.Node, None]


def find_attentions(flow: Dataflow) -> list[Attention]:
    """All attentions, in graph order."""
    products = set(flow.products)
    found = []
    for node in flow.products:
        attention = _of_op(flow, node) if _is_attention(node) else _of_products(flow, node, products)
        if attention is not None:
            found.append(attention)
    cores = {attention.core[-1] for attention in found}
    return [_with_output(flow, attention, cores) for attention in found]


def _is_attention(node: fx.Node) -> bool:
    return "attention" in op_name(node.target)


def _of_op(flow: Dataflow, node: fx.Node) -> Attention | None:
    args = arguments(node)
    operands = [args.get(name) for name in ("query", "key", "value")]
    if None in operands:
        operands = list(node.args[:3])
    mask: Any = args.get("attn_mask", args.get("attn_bias"))
    q, k, v = operands
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)):
        return None
    others = dict.fromkeys(flow.expanded(flow.of(mask)))
    sources = [*others, *(flow.aside.get(mask, ()) if isinstance(mask, fx.Node) else ())]
    return _attention(flow, (node,), {"q": q, "k": k, "v": v}, sources)


def _of_products(flow: Dataflow, node: fx.Node, products: set[fx.Node]) -> Attention | None:
    """The attention whose last product this is, if it is one."""
    pair = product_operands(node)
    for weights, values in (pair, pair[::-1]) if pair else ():
        scores = _Scores({}, {}, {})
        _search(flow, flow.of(weights), products, scores, False, _MOST_MIXING)
        main = _main_product(flow, scores.products)
        if main is None or values is weights:
            continue
        q, k = _query_and_key(flow, main)
        softmax = flow.softmax.get(main) or next(
            (flow.softmax[n] for n in scores.mix if n in flow.softmax), None
        )
        core = (main, softmax, node) if softmax is not None else (main, node)
        sources = [*scores.others, *flow.aside.get(weights, ())]
        if op_name(main.target) == "baddbmm" and isinstance(main.args[0], fx.Node):
            sources += [*flow.expanded(flow.of(main.args[0])), *flow.aside.get(main.args[0], ())]
        sources += [other for other in scores.products if other is not main]
        return _attention(flow, core, {"q": q, "k": k, "v": values}, sources, tuple(scores.mix))
    return None


def product_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product of two activations."""
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
    """Collect the products that a softmax separates from a value, looking through up to `mixing` weight ops."""
    hit = False
    opened = flow.expanded(origins) if any(n in flow.junctions for n in origins) else origins
    for node, flags in opened.items():
        softened = soft or bool(flags & SOFTMAX)
        call = flow.calls.get(node)
        if node in products:
            if softened and not _is_attention(node):
                scores.products[node] = None
                hit = True
        elif mixing and call is not None and call.kind in (LINEAR, CONV, EXPERTS):
            inner = flow.of(call.x)
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
    """Queries times keys: of the products behind the scores the one whose factors both rest on the input."""
    usable = [n for n in products if product_operands(n)]
    both = [n for n in usable if not any(o in flow.constant for o in product_operands(n) or ())]
    # Where several remain (deberta's content-to-position terms on data), content to content comes first.
    return min(both or usable, key=flow.order.__getitem__, default=None)


def _query_and_key(flow: Dataflow, product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The softmax runs over keys: the factor that has the score's last axis is the key."""
    left, right = product_operands(product) or (product, product)
    softmax = flow.softmax.get(product)
    axis = arguments(softmax).get("dim", -1) if softmax is not None else -1
    value = product.meta.get("val")
    rank = value.dim() if value is not None else 0
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
    beside: list[fx.Node],
    mix: tuple[fx.Node, ...] = (),
) -> Attention | None:
    made = {letter: _makers(flow, operand) for letter, operand in operands.items()}
    if not any(made.values()):
        return None
    own = {node for nodes in made.values() for node in nodes} | set(mix)
    bias = tuple(n for n in _with_constant_part(flow, beside) if n not in own)
    cross = not _same_stream(flow, made["q"], made["k"])
    return Attention(core, operands, made["q"], made["k"], made["v"], (), cross, bias, mix)


def _makers(flow: Dataflow, operand: fx.Node) -> tuple[fx.Node, ...]:
    found = flow.projections(operand)
    # What comes through a softmax weights the others (a router of projections).
    direct = [node for node, flags in found.items() if not flags & SOFTMAX]
    return tuple(direct or found)


def _with_constant_part(flow: Dataflow, origins: list[fx.Node]) -> Iterator[fx.Node]:
    """Weight ops among the origins, and those behind them as long as these rest on positions alone.

    Of a product of queries and positions the positions count.
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
            if node in flow.constant:
                stack.extend(flow.of(call.x))


def _same_stream(flow: Dataflow, queries: tuple[fx.Node, ...], keys: tuple[fx.Node, ...]) -> bool:
    if not queries or not keys or set(queries) & set(keys):
        return True
    return bool(_streams(flow, queries) & _streams(flow, keys))


def _streams(flow: Dataflow, projections: tuple[fx.Node, ...]) -> set[fx.Node | None]:
    """What projections read, and what that is derived from by convolutions (spatial reduction) and low-rank maps."""
    found: set[fx.Node | None] = set()
    stack = list(projections)
    while stack and len(found) < 16:
        origins = flow.of(flow.calls[stack.pop()].x)
        # Nothing behind it: zeros, as the first decoder layer of DETR starts from.
        found |= set(origins) or {None}
        stack.extend(n for n in origins if flow.is_projection(n))
    return found


def _with_output(flow: Dataflow, attention: Attention, cores: set[fx.Node]) -> Attention:
    """Add what reads the core's result."""
    last = attention.core[-1]
    own = {*attention.q, *attention.k, *attention.v}
    out: dict[fx.Node, None] = {}
    gates: dict[fx.Node, None] = {}
    for user in flow.uses.get(last, ()):
        users = [user]
        if user in flow.junctions:
            # What may be added to the result before its projection: the queries, a convolution of the values,
            # another attention; anything else is the residual stream.
            rest = set(flow.expanded(flow.junctions[user])) - own - cores
            users = [] if rest else flow.uses.get(user, [])
        for n in users:
            if flow.is_projection(n) and n not in own:
                out[n] = None
                gates.update(_gates(flow, flow.of(flow.calls[n].x), own | cores))
    return Attention(
        attention.core,
        attention.operands,
        attention.q,
        attention.k,
        attention.v,
        tuple(out),
        attention.cross,
        attention.bias,
        attention.mix,
        tuple(gates),
    )


def _gates(flow: Dataflow, origins: Origins, known: set[fx.Node]) -> dict[fx.Node, None]:
    return {
        n: None
        for n, flags in origins.items()
        if flags & NONLINEAR and n not in known and flow.is_projection(n)
    }
