"""Rules of ops that move values: labels run through the same ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from surgery.graph.propagate.links import is_tensor
from surgery.graph.propagate.sizes import hint
from surgery.passes.prune.coupling import Coupling
from surgery.passes.prune.labels import Labels, covered, first_of, sizes_of, where
from surgery.passes.prune.products import merge

Given = dict[str, Any]
Rule = Callable[[Coupling, fx.Node, Given], "Labels | list[Labels]"]


def full(run: Coupling, x: fx.Node) -> list[Tensor]:
    """Return the labels of a value, expanded to its full sizes."""
    sizes = sizes_of(x)
    return [label.expand(sizes) for label in run.labels.get(x, ())]


def layout(run: Coupling, node: fx.Node, given: Given) -> Labels | list[Labels]:
    """Run a layout op on each label of its first operand."""
    x = node.args[0]
    assert isinstance(x, fx.Node)

    def concrete(label: Tensor) -> Any:
        def value(n: fx.Node) -> Any:
            if n is x:
                # Other operands only provide sizes, so zeros of the right shape replace them.
                return label
            val = n.meta["val"]
            return label.new_zeros(sizes_of(n)) if isinstance(val, Tensor) else hint(val)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    results = [concrete(label) for label in full(run, x)]
    if results and isinstance(results[0], (list, tuple)):
        return [list(part) for part in zip(*results, strict=True)]
    return results


def view(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Reshape labels. A label that the view mixes with another one is frozen."""
    results = [label.reshape(sizes_of(node)) for label in full(run, node.args[0])]  # type: ignore[arg-type]
    return merge(
        run, [([label], sizes_of(node)) for label in results], sizes_of(node), where(node), apart=True
    )


def picks(argument: str) -> Rule:
    """Return the rule of a layout op that reads fixed positions along a dimension, so that it must keep its size."""

    def rule(run: Coupling, node: fx.Node, given: Given) -> Labels | list[Labels]:
        dims = given[argument]
        dims = [dims] if isinstance(dims, int) else list(dims)
        rank = len(sizes_of(node.args[0]))  # type: ignore[arg-type]
        for label in run.labels.get(node.args[0], ()):  # type: ignore[arg-type]
            run.keep_whole(label, {d % rank for d in dims}, f"{where(node)} reads fixed positions of it")
        return layout(run, node, given)

    return rule


def cut(run: Coupling, node: fx.Node, given: Given) -> Labels | list[Labels]:
    """Handle a slice: with steps it reads fixed positions, otherwise its bounds can be updated."""
    return (layout if given["step"] == 1 else picks("dim"))(run, node, given)


def index(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle advanced indexing: indexed dimensions keep their size; labels along the others pass through."""
    x, indices = node.args[0], given["indices"]
    dims = {d for d, index in enumerate(indices) if index is not None}
    zeros = [None if n is None else torch.zeros(sizes_of(n), dtype=torch.long) for n in indices]
    for n in indices:
        for label in run.labels.get(n, ()) if isinstance(n, fx.Node) else ():
            run.freeze(label, f"{where(node)} uses it as an index")
    if any(n is not None and n.meta["val"].dtype is torch.bool for n in indices):
        return run.unknown(node, "the size of its result depends on data")
    sizes, found = sizes_of(x), []  # type: ignore[arg-type]
    for label in run.labels.get(x, ()):  # type: ignore[arg-type]
        run.keep_whole(label, dims, f"{where(node)} reads fixed positions of it")
        if covered(label) - dims:
            # Index zeros have the result's shape, so indexing with them moves the label's dimensions into place.
            found.append(
                first_of(label, dims).expand(sizes)[tuple(z if z is not None else slice(None) for z in zeros)]
            )
    return found


def index_select(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle index_select: the indexed dimension keeps its size; labels along the others pass through."""
    x, sizes = node.args[0], sizes_of(node)
    dim = given["dim"] % len(sizes)
    found = []
    for label in run.labels.get(x, ()):  # type: ignore[arg-type]
        run.keep_whole(label, {dim}, f"{where(node)} reads fixed positions of it")
        if covered(label) - {dim}:
            found.append(first_of(label, {dim}))
    return found


def cat(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle a concatenation; see `_joined`."""
    operands = [n for n in given["tensors"] if is_tensor(n)]
    sizes = sizes_of(node)
    operands = [n for n in operands if len(sizes_of(n)) == len(sizes)]
    return _joined(
        run, node, [(run.labels.get(n, []), sizes_of(n)) for n in operands], given["dim"] % len(sizes)
    )


def stack(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle a stack as a concatenation along a new dimension; see `_joined`."""
    dim = given["dim"] % len(sizes_of(node))
    operands = [
        ([label.unsqueeze(dim) for label in run.labels.get(n, ())], _inserted(sizes_of(n), dim))
        for n in given["tensors"]
    ]
    return _joined(run, node, operands, dim)


def _inserted(sizes: list[int], dim: int) -> list[int]:
    return [*sizes[:dim], 1, *sizes[dim:]]


def _joined(run: Coupling, node: fx.Node, operands: list[tuple[Labels, list[int]]], dim: int) -> Labels:
    """Return the labels of a concatenation.

    Labels along the joined dimension are concatenated like the values. Labels along other dimensions are coupled
    between the operands.
    """
    sizes, why = sizes_of(node), f"{where(node)} joins it with values that cannot shrink"
    # Dimensions that labels along the joined axis depend on: these labels are concatenated like the values.
    along = {d for labels, _ in operands for label in labels if dim in covered(label) for d in covered(label)}
    others = [([one for one in labels if not covered(one) & along], own) for labels, own in operands]
    flat = [(labels, [1 if d == dim else size for d, size in enumerate(own)]) for labels, own in others]
    if not along:
        return merge(run, flat, sizes, where(node))
    pieces = []
    for labels, own in operands:
        here = [one for one in labels if covered(one) & along]
        # Such a label cannot be concatenated with those of the other operands.
        if len(here) > 1 or any(covered(one) - along for one in here):
            for label in here:
                run.freeze(label, why)
            here = []
        shape = [own[d] if d in along else 1 for d in range(len(own))]
        label = (
            here[0]
            if here
            else run.fresh(own[dim], why).reshape([-1 if d == dim else 1 for d in range(len(own))])
        )
        pieces.append(label.expand(shape))
    return [torch.cat(pieces, dim), *merge(run, flat, sizes, where(node))]


def pixels(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle a pixel shuffle: the r·r channels that form one output channel are coupled."""
    found = []
    for label in full(run, node.args[0]):  # type: ignore[arg-type]
        result = node.target(label, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        left = first_of(result, range(result.dim() - 2, result.dim()))
        run.couple(result, left)
        found.append(left)
    return found


def glu(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle glu: the two halves of its input are coupled, gate to value."""
    x = node.args[0]
    halves = [label.chunk(2, given["dim"]) for label in full(run, x)]  # type: ignore[arg-type]
    for a, b in halves:
        run.couple(a, b)
    return [a for a, _ in halves]
