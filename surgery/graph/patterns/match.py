"""Results of pattern matching: patterns, matches and near misses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import fx

from surgery.graph.ops import module_path
from surgery.graph.patterns.expressions import AnyOf, Op
from surgery.graph.patterns.index import Argument, read


class Match:
    """A place where a pattern matches.

    Attributes:
        pattern: the pattern.
        nodes: nodes of the pattern's ops, in graph order.
        outputs: nodes that ops outside of the match may read.
        anchor: node at which the match was found.
    """

    def __init__(
        self,
        pattern: Pattern,
        nodes: tuple[fx.Node, ...],
        outputs: tuple[fx.Node, ...],
        anchor: fx.Node,
        captured: dict[str, Any],
    ) -> None:
        self.pattern, self.nodes, self.outputs, self.anchor = pattern, nodes, outputs, anchor
        self._captured = captured

    def __contains__(self, name: str) -> bool:
        return name in self._captured

    def __getitem__(self, name: str) -> Any:
        """Return the value captured under a name; for a graph value, the node that is read there now.

        Raises:
            KeyError: if nothing was captured under this name.
        """
        if name not in self._captured:
            raise KeyError(name)
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the captured value, or the default if the alternative that captures it was not taken."""
        found = self._captured.get(name, default)
        return read(found) if isinstance(found, Argument) else found

    @property
    def captured(self) -> tuple[str, ...]:
        return tuple(self._captured)

    @property
    def path(self) -> str:
        """Path of the module that the anchor belongs to."""
        return module_path(self.anchor)


@dataclass(frozen=True)
class NearMiss:
    """A place where the anchor matches but the whole pattern does not.

    Attributes:
        anchor: node that matches the anchor.
        node: node at which the comparison that got furthest failed.
        reason: cause of the failure, in words.
        matched: number of ops matched until then, at least one (a node that fails the anchor's own conditions is not
            a near miss).
        captured: number of values captured until then.
    """

    anchor: fx.Node
    node: fx.Node
    reason: str
    matched: int
    captured: int = 0

    @property
    def path(self) -> str:
        return module_path(self.anchor)

    def __str__(self) -> str:
        ops = "1 op matches" if self.matched == 1 else f"{self.matched} ops match"
        return f"{ops}; at {self.node.name}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """Result of a search: matches that share no node, in graph order, and near misses."""

    matches: tuple[Match, ...]
    misses: tuple[NearMiss, ...]


@dataclass(frozen=True, eq=False)
class Pattern:
    """A pattern of ops.

    Attributes:
        name: name of the function that defines it.
        outputs: expressions whose nodes ops outside of the match may read.
        condition: check of a whole match. It returns None, or the reason why the match is rejected.
    """

    name: str
    outputs: tuple[Any, ...]
    condition: Callable[[Match], str | None] | None = None

    @property
    def required(self) -> tuple[Op, ...]:
        """Ops that every match contains, whichever alternatives it takes."""
        sets = [_required(output) for output in self.outputs]
        return tuple(dict.fromkeys(op for found in sets for op in found))


def _required(expression: Any) -> dict[Op, None]:
    if isinstance(expression, Op):
        found: dict[Op, None] = {expression: None}
        for inner in (*expression.args, *expression.kwargs.values()):
            found.update(_required(inner))
        return found
    if isinstance(expression, AnyOf):
        first, *rest = (_required(alternative) for alternative in expression.alternatives)
        return {op: None for op in first if all(op in other for other in rest)}
    if isinstance(expression, (list, tuple)):
        return {op: None for inner in expression for op in _required(inner)}
    return {}


Build = Callable[[], Any]


@overload
def pattern(build: Build, /) -> Pattern: ...


@overload
def pattern(*, condition: Callable[[Match], str | None]) -> Callable[[Build], Pattern]: ...


def pattern(
    build: Build | None = None, /, *, condition: Callable[[Match], str | None] | None = None
) -> Pattern | Callable[[Build], Pattern]:
    """Decorator that turns a function into a pattern; the expressions it returns are the outputs.

    Args:
        build: function that builds the expressions.
        condition: check of a whole match, see `Pattern.condition`.
    """

    def make(build: Build) -> Pattern:
        made = build()
        outputs: Sequence[Any] = made if isinstance(made, (tuple, list)) else (made,)
        return Pattern(build.__name__, tuple(outputs), condition)

    return make(build) if build is not None else make
