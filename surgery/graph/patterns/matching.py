"""Finds the matches and near misses of patterns in a graph.

The nodes of a graph are indexed by op once. A pattern is tried at the nodes of its anchor, by default the op of the
pattern that is rarest in this graph. Each anchor gives at most one match (see surgery.graph.patterns.attempt). So
the cost is the number of anchors times the size of the pattern.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from surgery.graph.patterns.attempt import Attempt
from surgery.graph.patterns.expressions import Op
from surgery.graph.patterns.index import OpIndex
from surgery.graph.patterns.match import Found, Match, NearMiss, Pattern


def find(index: OpIndex, *patterns: Pattern) -> Found:
    """Find every match of the patterns.

    If matches share a node, the pattern that is named first wins; within one pattern, the match that ends first in the
    graph, then the one with more nodes. The other matches become near misses.
    """
    order = index.order
    misses: list[NearMiss] = []
    taken: dict[fx.Node, Match] = {}
    for pattern in patterns:
        found: list[Match] = []
        anchor = _anchor(pattern, index)
        for node in index.of(anchor):
            if node in taken:
                continue
            attempt = Attempt(pattern, index, anchor, node)
            match = attempt.match()
            if match is not None:
                found.append(match)
            elif attempt.live and attempt.deepest[0][0]:
                misses.append(attempt.miss())
        for match in sorted(found, key=lambda m: (order[m.nodes[-1]], -len(m.nodes))):
            shared = next((n for n in match.nodes if n in taken), None)
            if shared is None:
                taken.update(dict.fromkeys(match.nodes, match))
            elif match.anchor not in taken:
                reason = f"it belongs to the match at {taken[shared].anchor.name}"
                misses.append(NearMiss(match.anchor, shared, reason, len(match.nodes)))
    matches = sorted(set(taken.values()), key=lambda m: order[m.anchor])
    return Found(tuple(matches), _nearest((m for m in misses if m.anchor not in taken), index))


def _nearest(misses: Iterable[NearMiss], index: OpIndex) -> tuple[NearMiss, ...]:
    """Keep the near miss that got furthest at each anchor, in graph order."""
    best: dict[fx.Node, NearMiss] = {}
    for miss in misses:
        known = best.get(miss.anchor)
        if known is None or (miss.matched, miss.captured) > (known.matched, known.captured):
            best[miss.anchor] = miss
    return tuple(sorted(best.values(), key=lambda m: index.order[m.anchor]))


def _anchor(pattern: Pattern, index: OpIndex) -> Op:
    """Return the op to start at: the one that the pattern names, or the rarest op that every match contains.

    Raises:
        ValueError: if all ops of the pattern are in alternatives.
    """
    required = pattern.required
    if not required:
        raise ValueError(
            f"pattern {pattern.name!r} has no op that every match contains; write one outside of any_of"
        )
    named = next((op for op in required if op.is_anchor), None)
    return named or min(required, key=lambda op: len(index.of(op)))
