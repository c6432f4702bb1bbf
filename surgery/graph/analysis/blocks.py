"""Rows of repeated blocks along the residual stream: layers of an encoder or decoder, blocks of a stage.

A step is a residual branch, or several parallel branches. A row is a tandem repeat in the sequence of steps.
Steps are compared by the kinds of their branches and by the ops between them (a post-norm, an activation), but
not by shapes. So all blocks of a ResNet stage form one row, although the strided ones have a projection
shortcut (and are not `repeatable`). A change of stage with its own weights (Swin's patch merging) ends a row.
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
    """One block of a row of repeated blocks.

    Attributes:
        group: index of the row.
        index: position of the block in its row.
        input: stream value that enters the block. It is the output of the previous block of the row.
        output: stream value that leaves the block.
        nodes: ops to copy with the block, in graph order: those on paths from input to output, and ops that only
            these read (keys and values of the encoder's output, position tables).
        calls: weight ops of the block, in graph order.
        branches: the branches from `find_branches` that lie in the block.
        repeatable: True if the output can be fed to the block again: the shapes of input and output are equal, and
            every shortcut is the identity.
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
    """Residuals that read one value of the stream, up to the last one's sum.

    Attributes:
        residuals: parallel residuals of this step.
        input: stream value that they read.
        kinds: kinds of their branches; steps are compared by these.
        between: nodes between the previous step's sum and the input, in descending graph order.
        has_identity: True if every shortcut is the identity.
        staged: True if the step is next to a change of stage: a projection on the stream itself.
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
        """Names of the ops before this step, without those that only move values."""
        return tuple(op_name(n.target) for n in reversed(self.between) if moved_from(n) is None)


def find_blocks(
    graph: fx.Graph, calls: Sequence[Call], flow: Dataflow, branches: Sequence[Branch]
) -> list[tuple[Block, ...]]:
    """Find the rows of repeated blocks, in graph order; empty if the model has no residual adds.

    A row of one block occurs only if the same block is repeated in another stage of the model.

    Args:
        graph: graph to search.
        calls: weight ops of the graph.
        flow: dataflow of these calls.
        branches: result of `find_branches` for the graph.

    Returns:
        One tuple of blocks for each row.
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
    """Input and output of a block. has_identity: every shortcut in between is the identity."""

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
    """Yield the block extents of every row, searching inside residuals that belong to no row."""
    chains = _chains(stream, _steps(stream, residuals, by_join))
    rows = [row for chain in chains for row in _repeats(chain, 0, len(chain)) if any(row.kinds)]
    rows += _alone(chains, rows)
    # An outer residual (MobileBERT, SwinIR's groups) may enclose a whole row, so the search goes one level down.
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
        # Parallel branches read the same stream value, at most through different views or casts.
        parallel = bool(steps) and _line(residual.start)[-1] is _line(steps[-1].residuals[0].start)[-1]
        group = [*(steps.pop().residuals if parallel else ()), residual]
        kinds = tuple(sorted(_mixing(branch) for r in group for branch in by_join.get(r.join, ())))
        start = _common(group)
        between = [n for n in group[0].between if stream.order[n] <= stream.order[start]]
        identity = all(stream.root[r.skip] is stream.root[r.start] for r in group)
        steps.append(_Step(group, start, kinds, between, identity))
    return steps


def _mixing(branch: Branch) -> str:
    """Return the kind by which steps are compared.

    Hybrid models (Jamba) have an attention in some blocks and a state-space mixer in others; these count as equal.
    """
    return ATTENTION if branch.kind == OTHER else branch.kind


def _common(residuals: Sequence[Residual]) -> fx.Node:
    """Return the latest value that the starts of the branches and the shortcut have in common."""
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
    """Group consecutive steps with no projection between them and no other stream value read there."""
    by_join = {step.join: step for step in steps}
    follower: dict[int, _Step] = {}
    chained: set[int] = set()
    for step in steps:
        before = step.residuals[0].before
        earlier = by_join.get(before.join) if before is not None else None
        if earlier is None or id(earlier) in follower or not _reads_only(stream, step, earlier.join):
            continue
        if any(stream.is_projection(node) for node in step.between):
            # A projection on the stream itself is a change of stage (patch merging): the row ends here.
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
    """Blocks of `period` steps each. border: the sum that ends one such block, and the step that follows it."""

    steps: Sequence[_Step]
    period: int
    border: tuple[fx.Node, _Step] | None

    @property
    def kinds(self) -> tuple[tuple[str, ...], ...]:
        return tuple(step.kinds for step in self.steps[: self.period])


def _repeats(chain: Sequence[_Step], low: int, high: int) -> Iterator[_Row]:
    """Yield the tandem repeats of chain[low:high]: the longest, and those before and after it."""
    first, period, run, length = low, 0, 0, 0
    for step in range(1, min(_LONGEST_PERIOD, (high - low) // 2) + 1):
        # `equal` is the length of the current run in which every element equals the one `step` further on.
        equal = 0
        for i in range(low, high - step):
            same = chain[i].kinds == chain[i + step].kinds
            equal = equal + 1 if same and equal and _same_border(chain[i], chain[i + step]) else int(same)
            covered = (equal // step + 1) * step
            goes_on = (first, period) == (i - equal + 1, step)
            # Only a strictly longer repeat wins, so of equal coverings the shortest period is kept.
            if covered > step and (covered > length or goes_on):
                first, period, run, length = i - equal + 1, step, equal + step, covered
    if not length:
        return
    # The same repeat can be cut at several steps. A block does not begin with a feed-forward branch.
    spare = range(run - length + 1)
    first += next((k for k in spare if chain[first + k].kinds != (FEED_FORWARD,)), 0)
    yield from _repeats(chain, low, first)
    heads = range(first + period, first + length, period)
    # The border is read at a block with an identity shortcut: a projection shortcut may start elsewhere.
    head = next((k for k in heads if chain[k].has_identity), heads[0])
    yield _Row(chain[first : first + length], period, (chain[head - 1].join, chain[head]))
    yield from _repeats(chain, first + length, high)


def _same_border(one: _Step, other: _Step) -> bool:
    """True if two steps are preceded by the same ops.

    A projection shortcut may start after a norm that belongs to the branch in other blocks (Hiera), so steps with
    one are not compared.
    """
    return one.signature == other.signature or not (one.has_identity and other.has_identity)


def _alone(chains: Sequence[Sequence[_Step]], rows: Iterable[_Row]) -> Iterator[_Row]:
    """Yield rows of one block: blocks that equal those of another row, and one-block stages that occur twice."""
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
    # Longer blocks first: a block of two steps must not be taken for two blocks of one step.
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
    """Return the extents of the blocks of a row.

    The border of a block is the value that the next block reads as its stream: the sum, or the result of a
    post-norm, an activation or a view of it. The last block ends with the same op; if it does not, all borders of
    the row are the sums.
    """
    first, border = row.steps[0].input, row.border
    joins = [step.join for step in row.steps[row.period - 1 :: row.period]]
    ends = [_alike(stream, *border, join) if border else _shaped(join, first) for join in joins]
    borders = [_past_gate(end) for end in ends if end is not None]
    # All blocks must end alike: the output of one is the input of the next, and a copy is inserted there.
    borders = borders if len(borders) == len(joins) else joins
    starts = range(0, len(row.steps), row.period)
    identity = [all(step.has_identity for step in row.steps[i : i + row.period]) for i in starts]
    inputs = [first, *borders[:-1]]
    return [_Extent(*extent) for extent in zip(inputs, borders, identity, strict=True)]


def _past_gate(node: fx.Node) -> fx.Node:
    """Return the output of the gate of an inserted block, or the node itself if no gate follows."""
    following = next((user for user in node.users if gated_by(user) is node), None)
    return _past_gate(following) if following is not None else node


def _shaped(join: fx.Node, other: fx.Node) -> fx.Node | None:
    """Return the view of a sum that has the shape of `other`, or None if another op reads the sum."""
    node = join
    while shape_of(node) != shape_of(other):
        users = list(node.users)
        if len(users) != 1 or moved_from(users[0]) is not node:
            return None
        node = users[0]
    return node


def _alike(stream: Stream, join: fx.Node, step: _Step, other: fx.Node) -> fx.Node | None:
    """Return the node that follows the sum `other` as `step.input` follows `join`, or None if other ops follow."""
    twin, taken = {join: other}, {other}
    for node in reversed(step.between):
        operand = next((n for n in stream.inputs[node] if n in twin), None)
        if operand is None:
            continue  # Depends on parameters alone.
        found = next((user for user in twin[operand].users if _is_twin(node, user, twin, taken)), None)
        if found is not None:
            taken.add(found)
        # A cast or view may be missing at one of the blocks without changing the values.
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
