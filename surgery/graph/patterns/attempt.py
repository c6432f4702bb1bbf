"""Matches a pattern at one anchor: compares expressions with arguments and backtracks over all choices.

Arguments are compared downwards from the anchor. Outputs that the anchor does not depend on are reached through users
of nodes that are bound already. Choices are alternatives and the order of commutative operands. The first combination
that satisfies all conditions, including that of the whole match, wins. The failure that got furthest is kept as the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from surgery.graph.analysis.dataflow import op_name
from surgery.graph.ops import arguments, rank_of
from surgery.graph.patterns.expressions import COMMUTATIVE, AnyOf, Axis, Constant, Op, Value
from surgery.graph.patterns.index import Argument, OpIndex, Where, read
from surgery.graph.patterns.match import Match, NearMiss, Pattern

# Limit of comparisons at one anchor. A pattern that needs more is too general.
_MOST_STEPS = 20_000


class _TooLong(Exception):
    """Raised when an attempt exceeds `_MOST_STEPS`."""


@dataclass
class Attempt:
    """Attempt to match a pattern at one anchor.

    Attributes:
        pattern: pattern to match.
        index: index of the graph.
        anchor: expression to start at.
        node: node to start at.
        bound: graph value or constant by expression.
        nodes: expression by node.
        captured: captured values by name.
        deepest: furthest failure: depth, node and reason.
        steps: comparisons made so far.
    """

    pattern: Pattern
    index: OpIndex
    anchor: Op
    node: fx.Node
    bound: dict[Any, Any] = field(default_factory=dict)
    nodes: dict[fx.Node, Op] = field(default_factory=dict)
    captured: dict[str, Any] = field(default_factory=dict)
    deepest: tuple[tuple[int, int], fx.Node | None, str] = ((-1, 0), None, "")
    steps: int = 0

    @cached_property
    def live(self) -> bool:
        """True if an output depends on the anchor.

        Replaced nodes are matched too, so that sites keep their numbers.
        """
        return self.node in self.index.live

    def match(self) -> Match | None:
        try:
            for _ in self._same(self.anchor, self.node, None):
                for _ in self._outputs(0):
                    found = self._whole()
                    if found is not None:
                        return found
        except _TooLong:
            why = f"more than {_MOST_STEPS:,} comparisons; make the pattern more specific"
            self.deepest = (self._depth, self.node, why)
        return None

    def miss(self) -> NearMiss:
        depth, node, reason = self.deepest
        return NearMiss(self.node, node or self.node, reason, *depth)

    @property
    def _depth(self) -> tuple[int, int]:
        """Progress of the attempt: number of ops, then number of captures."""
        return len(self.nodes), len(self.captured)

    def _fail(self, node: fx.Node, reason: str) -> None:
        if self._depth > self.deepest[0]:
            self.deepest = (self._depth, node, reason)

    # -- a whole match

    def _whole(self) -> Match | None:
        order = self.index.order
        nodes = tuple(sorted(self.nodes, key=order.__getitem__))
        outputs = tuple(self.bound[output] for output in self.pattern.outputs)
        for node in nodes:
            # The match will be replaced as a whole, so an inner value must have no other readers.
            if node not in outputs:
                outside = next((u for u in self.index.users(node, self.live) if u not in self.nodes), None)
                if outside is not None:
                    self._fail(node, f"its value is also read by {outside.name}, outside of the pattern")
                    return None
        match = Match(self.pattern, nodes, outputs, self.node, dict(self.captured))
        for name in match.captured:
            captured = match[name]
            # The replacement reads captured values later than the original ops: a write in between would change them.
            writer = self._written(captured, nodes, outputs) if isinstance(captured, fx.Node) else None
            if writer is not None:
                self._fail(writer, f"{name!r} is changed in place there, between the pattern's ops")
                return None
        why = self.pattern.condition(match) if self.pattern.condition is not None else None
        if why is not None:
            self._fail(self.node, why)
            return None
        return match

    def _written(self, node: fx.Node, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Node | None:
        """Return an in-place op that changes a value while the pattern's ops run, or None."""
        order = self.index.order
        first, last = order[nodes[0]], max(order[output] for output in outputs)
        return next((u for u in node.users if first < order[u] < last and _writes(u, node)), None)

    def _outputs(self, number: int) -> Iterator[None]:
        if number == len(self.pattern.outputs):
            yield
            return
        output = self.pattern.outputs[number]
        if output in self.bound:
            yield from self._outputs(number + 1)
            return
        for candidate in list(self._candidates(output)):
            for _ in self._same(output, candidate, None):
                yield from self._outputs(number + 1)

    def _candidates(self, expression: Any) -> Iterator[fx.Node]:
        """Yield nodes that an expression could match, reached through users of nodes that are bound already."""
        known = self.bound.get(expression) if not isinstance(expression, Value) else None
        if isinstance(expression, Value) and expression.name in self.captured:
            known = read(self.captured[expression.name])
        if isinstance(known, fx.Node):
            yield known
        elif isinstance(expression, AnyOf):
            for alternative in expression.alternatives:
                yield from self._candidates(alternative)
        elif isinstance(expression, Op):
            seen: set[fx.Node] = set()
            below: fx.Node | None = None
            for inner in _operands(expression):
                for below in self._candidates(inner):
                    for user in self.index.users(below, self.live):
                        if user not in seen and op_name(user.target) in expression.names:
                            seen.add(user)
                            yield user
                # One bound operand is enough: each node of the op must read it, so other operands add no candidates.
                if below is not None:
                    break
            if below is not None and not seen:
                self._fail(below, f"no op reads it as {expression}")

    # -- one comparison

    def _same(self, expression: Any, found: Any, where: Where | None) -> Iterator[None]:
        """Yield once for each way to match an expression with an argument; bindings are undone before the next."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise _TooLong
        if expression is ...:
            yield
        elif isinstance(expression, Op):
            yield from self._op(expression, found, where)
        elif isinstance(expression, AnyOf):
            yield from self._any(expression, found, where)
        elif isinstance(expression, Value):
            yield from self._value(expression, found, where)
        elif isinstance(expression, Constant):
            yield from self._constant(expression, found, where)
        elif isinstance(expression, (list, tuple)):
            if isinstance(found, (list, tuple)) and len(found) == len(expression):
                pairs = [
                    (e, f, _inner(where, i)) for i, (e, f) in enumerate(zip(expression, found, strict=True))
                ]
                yield from self._all(pairs, 0)
            else:
                self._differs(expression, found, where)
        elif _equal(expression, found, where):
            yield
        else:
            self._differs(expression, found, where)

    def _all(self, pairs: Sequence[tuple[Any, Any, Where | None]], number: int) -> Iterator[None]:
        if number == len(pairs):
            yield
            return
        for _ in self._same(*pairs[number]):
            yield from self._all(pairs, number + 1)

    def _differs(self, expression: Any, found: Any, where: Where | None) -> None:
        node = found if isinstance(found, fx.Node) else where[0] if where else self.node
        shown = (
            f"'{op_name(found.target)}'"
            if isinstance(found, fx.Node) and found.op == "call_function"
            else None
        )
        shown = shown or ("an input or a weight" if isinstance(found, fx.Node) else repr(found))
        slot = f"its {where[1][0]} is" if where and node is where[0] else "it is"
        self._fail(node, f"{slot} {shown}, and the pattern has {_shown(expression)}")

    def _any(self, expression: AnyOf, found: Any, where: Where | None) -> Iterator[None]:
        if expression in self.bound:
            if self.bound[expression] is found:
                yield
            else:
                self._other(expression, found, where)
            return
        self.bound[expression] = found
        for alternative in expression.alternatives:
            yield from self._same(alternative, found, where)
        del self.bound[expression]

    def _other(self, expression: Any, found: Any, where: Where | None) -> None:
        node = found if isinstance(found, fx.Node) else where[0] if where else self.node
        self._fail(node, f"{expression} is bound to another value already")

    def _value(self, expression: Value, found: Any, where: Where | None) -> Iterator[None]:
        if not isinstance(found, fx.Node):
            self._differs(expression, found, where)
            return
        if expression.condition is not None and not expression.condition(found):
            self._fail(found, f"{expression.name!r} is not {expression.what}")
            return
        known = self.captured.get(expression.name)
        if known is not None:
            if read(known) is found:
                yield
            else:
                self._fail(found, f"{expression.name!r} is {read(known).name} elsewhere in the pattern")
            return
        assert where is not None
        self.captured[expression.name] = Argument(where)
        yield
        del self.captured[expression.name]

    def _constant(self, expression: Constant, found: Any, where: Where | None) -> Iterator[None]:
        fits = not _has_node(found) and (expression.condition is None or expression.condition(found))
        if not fits:
            self._differs(expression, found, where)
        elif expression.name not in self.captured:
            self.captured[expression.name] = found
            yield
            del self.captured[expression.name]
        elif _equal(self.captured[expression.name], found, where):
            yield
        else:
            known = self.captured[expression.name]
            self._fail(
                where[0] if where else self.node,
                f"{expression.name!r} is {known!r} elsewhere, {found!r} here",
            )

    def _op(self, expression: Op, found: Any, where: Where | None) -> Iterator[None]:
        if expression in self.bound:
            if self.bound[expression] is found:
                yield
            else:
                self._other(expression, found, where)
            return
        is_op = (
            isinstance(found, fx.Node)
            and found.op == "call_function"
            and op_name(found.target) in expression.names
        )
        if not is_op:
            self._differs(expression, found, where)
            return
        if found in self.nodes:
            self._fail(found, f"it already matches another {expression} of the pattern")
            return
        for condition, what in expression.conditions:
            if not condition(found):
                self._fail(found, f"it is {expression}, but not {what}")
                return
        self.bound[expression], self.nodes[found] = found, expression
        fresh = expression.capture and expression.capture not in self.captured
        if fresh:
            self.captured[expression.capture] = found
        for pairs in self._pairings(expression, found):
            yield from self._all(pairs, 0)
        if fresh:
            del self.captured[expression.capture]
        del self.bound[expression], self.nodes[found]

    def _pairings(self, expression: Op, node: fx.Node) -> Iterator[list[tuple[Any, Any, Where]]]:
        """Yield the arguments paired with the pattern's expressions, in each operand order that the op allows."""
        given, schema = self.index.arguments(node), getattr(node.target, "_schema", None)
        names = list(given)
        wanted = list(expression.args)
        open_ended = bool(wanted) and wanted[-1] is ...
        if open_ended:
            wanted.pop()
        if len(wanted) > len(names) or not expression.kwargs.keys() <= given.keys():
            self._fail(node, f"this overload of {expression} has other arguments than the pattern")
            return
        # An argument that the pattern omits must have its default, otherwise the op computes something else.
        if not open_ended and schema is not None:
            said = {*names[: len(wanted)], *expression.kwargs}
            for argument in schema.arguments:
                default = argument.default_value if argument.has_default_value() else None
                if argument.name not in said and given[argument.name] != default:
                    self._fail(
                        node,
                        f"its {argument.name} is {given[argument.name]!r}, but the pattern requires the default",
                    )
                    return
        keywords = [(e, given[name], (node, (name,))) for name, e in expression.kwargs.items()]
        orders = [(0, 1), (1, 0)] if op_name(node.target) in COMMUTATIVE and len(wanted) >= 2 else [None]
        for order in orders:
            keys = [names[i] for i in order] + names[2 : len(wanted)] if order else names[: len(wanted)]
            yield [*((e, given[k], (node, (k,))) for e, k in zip(wanted, keys, strict=True)), *keywords]


def _operands(expression: Op) -> Iterator[Any]:
    """Yield the operands of an op expression, captured values last: these often have many users."""
    given = (*expression.args, *expression.kwargs.values())
    flat = [e for inner in given for e in (inner if isinstance(inner, (list, tuple)) else (inner,))]
    yield from sorted(flat, key=lambda e: isinstance(e, Value))


def _shown(expression: Any) -> str:
    if isinstance(expression, (list, tuple)):
        return f"[{', '.join(map(_shown, expression))}]"
    return str(expression)


def _inner(where: Where | None, number: int) -> Where | None:
    return (where[0], (*where[1], number)) if where else None


def _has_node(found: Any) -> bool:
    if isinstance(found, (list, tuple)):
        return any(_has_node(item) for item in found)
    return isinstance(found, fx.Node)


def _equal(expected: Any, found: Any, where: Where | None) -> bool:
    if isinstance(expected, Axis):
        if not isinstance(found, int) or where is None:
            return False
        # Axes count from either end, so they are compared modulo the rank of the op's input.
        rank = rank_of(where[0].all_input_nodes[0])
        return rank > 0 and found % rank == expected.index % rank
    if isinstance(found, fx.Node):
        return False
    number = (int, float)
    if isinstance(expected, number) and isinstance(found, number) and not isinstance(found, bool):
        return not isinstance(expected, bool) and math.isclose(expected, found, rel_tol=1e-6)
    return type(expected) is type(found) and expected == found


def _writes(user: fx.Node, node: fx.Node) -> bool:
    schema = getattr(user.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    given = arguments(user)
    return any(
        a.alias_info is not None and a.alias_info.is_write and given[a.name] is node for a in schema.arguments
    )
