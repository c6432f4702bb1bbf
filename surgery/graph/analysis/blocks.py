"""Rows of repeated blocks along the stream: the layers of an encoder or decoder, the blocks of a stage.

Branches that follow one another are steps; parallel branches are one step. A row is a tandem repeat in the
sequence of steps: their kinds, and what lies between them (a post-norm, an activation), without shapes. So the
blocks of a ResNet are one row, although its strided blocks have a projection shortcut (these are not
`repeatable`); a change of stage by weights of its own (Swin's patch merging) ends a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from surgery.graph.analysis.branches import ATTENTION, FEED_FORWARD, OTHER, Branch, find_branches
from surgery.graph.analysis.dataflow import Dataflow, op_name
from surgery.graph.analysis.residuals import Residual, Stream, find_residuals, gated_by, moved_from, shape_of
from surgery.graph.ops import Call

__all__ = ["Block", "Branch", "find_blocks", "find_branches"]

_LONGEST_PERIOD = 32


@dataclass(frozen=True)
class Block:
    """One of a row of repeated blocks along the stream.

    group, index: which row, and the place in it. input, output: the one value of the stream in, and out; the
    output of a block is the input of the next.
    nodes: the ops that a copy of the block must copy, in graph order: those on paths from input to output, and
    what only these read and is computed there (keys and values of the encoder's output, tables of positions).
    calls: its weight ops in graph order. branches: those of `find_branches` that lie in it.
    repeatable: whether its output can be its input: they have one shape, and every shortcut is the identity.
    """

    group: int
    index: int
    input: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    calls: tuple[Call, ...]
    branches: tuple[Branch, ...]
    repeatable: bool


@dataclass
class _Step:
    """Residuals that read one value of the stream, from that value to the last one's sum.

    kinds: of their branches, as rows tell them apart. has_identity: every shortcut is the identity.
    between: what lies between the sum before and the input, in descending order. staged: weights change the
    stream before or after it, and no more than that (a stage ends).
    """

    residuals: list[Residual]
    input: fx.Node
    kinds: tuple[str, ...]
    between: list[fx.Node]
    has_identity: bool
    staged: bool = False

    @property
    def join(self) -> fx.Node:
        return self.residuals[-1].join

    @property
    def signature(self) -> tuple[str, ...]:
        """The ops before this step; those that only move values do not count."""
        return tuple(op_name(n.target) for n in reversed(self.between) if moved_from(n) is None)


def find_blocks(
    graph: fx.Graph, calls: Sequence[Call], flow: Dataflow, branches: Sequence[Branch]
) -> list[tuple[Block, ...]]:
    """Rows of repeated blocks, in graph order; none where a model has no residual adds.

    A row has one block only where a stage of the model has (the same block is repeated in other stages).
    """
    stream = Stream(graph, calls, flow)
    by_join: dict[fx.Node, list[Branch]] = {}
    for branch in branches:
        by_join.setdefault(branch.join, []).append(branch)
    residuals = [residual for residual in find_residuals(stream) if residual.parent is None]
    spans = sorted(_spans(stream, residuals, by_join), key=lambda span: stream.order[span[0].output])
    return [
        tuple(_block(stream, group, index, extent, by_join) for index, extent in enumerate(span))
        for group, span in enumerate(spans)
    ]


@dataclass(frozen=True)
class _Extent:
    """Where a block begins and ends. has_identity: every shortcut in between is the identity."""

    input: fx.Node
    output: fx.Node
    has_identity: bool


def _block(
    stream: Stream, group: int, index: int, extent: _Extent, by_join: Mapping[fx.Node, Sequence[Branch]]
) -> Block:
    start, end = extent.input, extent.output
    _, passed = stream.behind(end, lambda n: n is start, stream.order[start])
    nodes = stream.enclosed(start, passed)[::-1]
    calls = tuple(stream.calls[node] for node in nodes if node in stream.calls)
    branches = tuple(branch for node in nodes for branch in by_join.get(node, ()))
    repeatable = extent.has_identity and shape_of(start) == shape_of(end)
    return Block(group, index, start, end, tuple(nodes), calls, branches, repeatable)


def _spans(
    stream: Stream, residuals: Sequence[Residual], by_join: Mapping[fx.Node, Sequence[Branch]]
) -> Iterator[list[_Extent]]:
    """Extents of the blocks of every row; where residuals are in no row, of those within them."""
    chains = _chains(stream, _steps(stream, residuals, by_join))
    rows = [row for chain in chains for row in _repeats(chain, 0, len(chain)) if any(row.kinds)]
    rows += _alone(chains, rows)
    yield from (_extents(stream, row) for row in rows)
    taken = {id(step) for row in rows for step in row.steps}
    for step in (step for chain in chains for step in chain if id(step) not in taken):
        for residual in step.residuals:
            if residual.has_chain:
                yield from _spans(stream, residual.children, by_join)


def _steps(
    stream: Stream, residuals: Iterable[Residual], by_join: Mapping[fx.Node, Sequence[Branch]]
) -> list[_Step]:
    steps: list[_Step] = []
    for residual in residuals:
        parallel = bool(steps) and _line(residual.start)[-1] is _line(steps[-1].residuals[0].start)[-1]
        group = [*(steps.pop().residuals if parallel else ()), residual]
        kinds = tuple(sorted(_mixing(branch) for r in group for branch in by_join.get(r.join, ())))
        start = _common(group)
        between = [n for n in group[0].between if stream.order[n] <= stream.order[start]]
        identity = all(stream.root[r.skip] is stream.root[r.start] for r in group)
        steps.append(_Step(group, start, kinds, between, identity))
    return steps


def _mixing(branch: Branch) -> str:
    """Hybrid models (Jamba) have an attention in some blocks, where others have a state-space mixer."""
    return ATTENTION if branch.kind == OTHER else branch.kind


def _common(residuals: Sequence[Residual]) -> fx.Node:
    """The last value that the branches and the shortcut are both views or casts of."""
    lines = [_line(r.start) for r in residuals]
    skip = _line(residuals[0].skip)
    if skip[-1] is lines[0][-1]:
        lines.append(skip)
    return next(n for n in lines[0] if all(n in line for line in lines))


def _line(node: fx.Node) -> list[fx.Node]:
    line = [node]
    while (below := moved_from(line[-1])) is not None:
        line.append(below)
    return line


def _chains(stream: Stream, steps: Sequence[_Step]) -> list[list[_Step]]:
    """Steps that follow one another with no projection in between and nothing else read there."""
    by_join = {step.join: step for step in steps}
    follower: dict[int, _Step] = {}
    chained: set[int] = set()
    for step in steps:
        before = step.residuals[0].before
        earlier = by_join.get(before.join) if before is not None else None
        if earlier is None or id(earlier) in follower or not _reads_only(stream, step, earlier.join):
            continue
        if any(stream.is_projection(node) for node in step.between):
            earlier.staged = step.staged = True
        else:
            follower[id(earlier)] = step
            chained.add(id(step))
    chains = []
    for step in steps:
        if id(step) not in chained:
            chain = [step]
            while id(chain[-1]) in follower:
                chain.append(follower[id(chain[-1])])
            chains.append(chain)
    return chains


def _reads_only(stream: Stream, step: _Step, join: fx.Node) -> bool:
    inside = {join, *step.between}
    operands = (n for node in step.between if gated_by(node) is None for n in stream.inputs[node])
    return all(operand in inside or operand not in stream.values for operand in operands)


@dataclass(frozen=True)
class _Row:
    """Blocks of `period` steps each. border: a sum that such a block ends with and the step that follows it."""

    steps: Sequence[_Step]
    period: int
    border: tuple[fx.Node, _Step] | None

    @property
    def kinds(self) -> tuple[tuple[str, ...], ...]:
        return tuple(step.kinds for step in self.steps[: self.period])


def _repeats(chain: Sequence[_Step], low: int, high: int) -> Iterator[_Row]:
    """The tandem repeats within chain[low:high]: the longest, then those before and after it."""
    first, period, run, length = low, 0, 0, 0
    for step in range(1, min(_LONGEST_PERIOD, (high - low) // 2) + 1):
        equal = 0
        for i in range(low, high - step):
            same = chain[i].kinds == chain[i + step].kinds
            equal = equal + 1 if same and equal and _same_border(chain[i], chain[i + step]) else int(same)
            covered = (equal // step + 1) * step
            goes_on = (first, period) == (i - equal + 1, step)
            if covered > step and (covered > length or goes_on):
                first, period, run, length = i - equal + 1, step, equal + step, covered
    if not length:
        return
    # Where a repeat can begin at several steps: a block does not begin with a feed-forward.
    spare = range(run - length + 1)
    first += next((k for k in spare if chain[first + k].kinds != (FEED_FORWARD,)), 0)
    yield from _repeats(chain, low, first)
    heads = range(first + period, first + length, period)
    head = next((k for k in heads if chain[k].has_identity), heads[0])
    yield _Row(chain[first : first + length], period, (chain[head - 1].join, chain[head]))
    yield from _repeats(chain, first + length, high)


def _same_border(one: _Step, other: _Step) -> bool:
    """A projection shortcut may start after a norm that is the branch's own in other blocks (Hiera)."""
    return one.signature == other.signature or not (one.has_identity and other.has_identity)


def _alone(chains: Sequence[Sequence[_Step]], rows: Iterable[_Row]) -> Iterator[_Row]:
    """Rows of one: blocks like those of a row elsewhere, and stages of one block that is another stage's too."""
    taken, borders = set[int](), dict[tuple[tuple[str, ...], ...], tuple[fx.Node, _Step] | None]()
    for row in rows:
        taken.update(map(id, row.steps))
        borders.setdefault(row.kinds, row.border)
    stages = [
        tuple(step.kinds for step in chain)
        for chain in chains
        if (chain[0].staged or chain[-1].staged) and not any(id(step) in taken for step in chain)
    ]
    for kinds in stages:
        if any(kinds) and stages.count(kinds) > 1:
            borders.setdefault(kinds, None)
    longest_first = sorted(borders, key=len, reverse=True)
    for chain in chains:
        for i in range(len(chain)):
            for kinds in longest_first:
                steps = chain[i : i + len(kinds)]
                free = not any(id(step) in taken for step in steps)
                if free and tuple(step.kinds for step in steps) == kinds:
                    taken.update(map(id, steps))
                    yield _Row(steps, len(steps), borders[kinds])
                    break


def _extents(stream: Stream, row: _Row) -> list[_Extent]:
    """A border is what a next block reads as its stream: the sum before, or what a post-norm, an activation or a
    view makes of it. The last block ends with the same; where it has none, all borders are at the sums."""
    first, border = row.steps[0].input, row.border
    joins = [step.join for step in row.steps[row.period - 1 :: row.period]]
    ends = [_alike(stream, *border, join) if border else _shaped(join, first) for join in joins]
    borders = [_past_gate(end) for end in ends if end is not None]
    borders = borders if len(borders) == len(joins) else joins
    starts = range(0, len(row.steps), row.period)
    identity = [all(step.has_identity for step in row.steps[i : i + row.period]) for i in starts]
    inputs = [first, *borders[:-1]]
    return [_Extent(*extent) for extent in zip(inputs, borders, identity, strict=True)]


def _past_gate(node: fx.Node) -> fx.Node:
    """What the gate of a block that was put in makes of its result."""
    following = next((user for user in node.users if gated_by(user) is node), None)
    return _past_gate(following) if following is not None else node


def _shaped(join: fx.Node, other: fx.Node) -> fx.Node | None:
    """A sum as what is made of it alone and has the shape of another value."""
    node = join
    while shape_of(node) != shape_of(other):
        users = list(node.users)
        if len(users) != 1 or moved_from(users[0]) is not node:
            return None
        node = users[0]
    return node


def _alike(stream: Stream, join: fx.Node, step: _Step, other: fx.Node) -> fx.Node | None:
    """What is to the sum `other` as the step's input is to `join`; None where other ops follow it."""
    twin, taken = {join: other}, {other}
    for node in reversed(step.between):
        operand = next((n for n in stream.inputs[node] if n in twin), None)
        if operand is None:
            continue  # rests on parameters alone
        found = next((user for user in twin[operand].users if _is_twin(node, user, twin, taken)), None)
        if found is not None:
            taken.add(found)
        elif moved_from(node) is not None:
            found = twin[operand]
        else:
            return None
        twin[node] = found
    return twin.get(step.input)


def _is_twin(node: fx.Node, user: fx.Node, twin: Mapping[fx.Node, fx.Node], taken: set[fx.Node]) -> bool:
    operands, others = node.all_input_nodes, user.all_input_nodes
    if user in taken or user.target != node.target or len(operands) != len(others):
        return False
    return all(n not in twin or twin[n] is o for n, o in zip(operands, others, strict=True))
