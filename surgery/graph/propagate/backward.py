"""Backward rules: how to give a dimension of a node another size, by its own arguments or by its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from surgery.graph.propagate.arguments import Draft
from surgery.graph.propagate.links import FACTORIES, is_broadcast, is_open, packet, rank, tensors
from surgery.graph.propagate.run import Run
from surgery.graph.propagate.sizes import Size, Unclear, is_one, one_to_one, same


@dataclass(frozen=True)
class Wish:
    """A request: dimension `dim` of `node` must have `size`, because `reader` needs it."""

    run: Run
    reader: fx.Node
    node: fx.Node
    dim: int
    size: Size

    @property
    def x(self) -> Any:
        return self.node.args[0]

    @property
    def from_end(self) -> int:
        return self.dim - rank(self.node)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return Draft.of(self.node).get(index, name, default)

    def shape(self, node: fx.Node | None = None) -> Any:
        """Return the shape of a node (default: this one) before the edit."""
        return self.run.before(node or self.node).shape

    def ask(self, operand: Any, dim: int, size: Size | None = None) -> None:
        """Request a size of a dimension of an operand; the default is this request's own size."""
        self.run.demand(self.reader, operand, dim, self.size if size is None else size)

    def own(self) -> None:
        """Record that the node's own argument determines the size; its forward rule writes the argument."""
        self.run.want(self.node, self.dim, self.size)

    def unclear(self, what: str) -> Unclear:
        """Build the error for a length that is needed of an op that cannot provide it."""
        return Unclear(f"length {self.size} is needed of {what}")


def follow(run: Run, reader: fx.Node, node: fx.Node, dim: int, size: Size) -> None:
    """Give dimension `dim` of a node another size, with the backward rule of its op.

    Args:
        run: the propagation.
        reader: node that needs the size; error messages name it.
        node: node to change.
        dim: dimension of the node.
        size: size it must have.

    Raises:
        Unclear: if the op has more than one way to get this size.
        PassError: if a node further back cannot be changed.
    """
    wish = Wish(run, reader, node, dim, size)
    rule = _broadcast if is_broadcast(node.target) else _RULES.get(packet(node.target), _like_first)
    rule(wish)


def _like_first(wish: Wish) -> None:
    """Handle an op that keeps the shape of its only operand, or of the first if the others are norm weights."""
    operands = tensors((wish.node.args, wish.node.kwargs))
    if operands and operands[0] is wish.x:
        a, b = wish.shape(wish.x), wish.shape()
        alike = len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        norm = packet(wish.node.target) in ("layer_norm", "rms_norm")
        # The normalized dimensions are fixed by the norm's weights, so only those before them may change.
        if alike and (len(operands) == 1 or (norm and wish.dim < len(b) - len(wish.arg(1, "")))):
            wish.ask(wish.x, wish.dim)
            return
    name = packet(wish.node.target)
    raise wish.unclear(f"{name}, and no rule tells how it follows from {wish.run.origin(wish.node)}")


def _broadcast(wish: Wish) -> None:
    # Operands of length 1 broadcast to any size and need no change.
    for operand in tensors((wish.node.args, wish.node.kwargs)):
        if rank(operand) >= -wish.from_end and not is_one(operand.meta["val"].shape[wish.from_end]):
            wish.ask(operand, wish.from_end)


def _view(wish: Wish) -> None:
    source = one_to_one(wish.shape(wish.x), wish.shape(), wish.dim)
    if source is None:
        raise wish.unclear(f"a view that mixes dimensions of {wish.run.origin(wish.node)}")
    wish.ask(wish.x, source)


def _reshape_as(wish: Wish) -> None:
    _view(wish)
    wish.ask(wish.arg(1, "other"), wish.dim)


def _expand(wish: Wish) -> None:
    # A dimension that the operand broadcasts into is set by the node's own size argument.
    source = wish.dim - (rank(wish.node) - rank(wish.x))
    if source >= 0 and not is_one(wish.shape(wish.x)[source]):
        wish.ask(wish.x, source)
    else:
        wish.own()


def _repeat(wish: Wish) -> None:
    source = wish.dim - (rank(wish.node) - rank(wish.x))
    if source < 0 or is_one(wish.shape(wish.x)[source]):
        wish.own()
    elif same(wish.shape(wish.x)[source], wish.shape()[wish.dim]):
        wish.ask(wish.x, source)
    else:
        raise wish.unclear("a repeated dimension")


def _slice(wish: Wish) -> None:
    along = wish.arg(1, "dim", 0) % rank(wish.x)
    if wish.dim != along:
        wish.ask(wish.x, wish.dim)
        return
    start, end = wish.arg(2, "start"), wish.arg(3, "end")
    first = 0 if start is None else wish.run.arguments.value(start)
    if wish.arg(4, "step", 1) != 1:
        raise wish.unclear("a slice with steps")
    have, whole = wish.node.meta["val"].shape[along], wish.x.meta["val"].shape[along]
    if is_open(end):
        if isinstance(first, int) and first < 0:
            if not same(-first, wish.shape(wish.x)[along]):
                raise wish.unclear(f"a slice that starts at {first}, from the end")
            wish.own()  # x[-n:] covered all of x, so it must cover the longer x as well.
            wish.ask(wish.x, along)
        else:
            # The number of cut elements stays: the operand must grow by as much as the slice.
            wish.ask(wish.x, along, whole + (wish.size - have))
        return
    if not (isinstance(first, int) and first == 0):
        raise wish.unclear(f"a slice that starts at {first}; either its start or its end could move")
    if same(have, whole):  # The slice cuts nothing off.
        wish.ask(wish.x, along)
    elif isinstance(whole, int) and isinstance(wish.size, int) and wish.size > whole:
        raise wish.unclear(f"{wish.run.origin(wish.node)}, which has {whole}")
    wish.own()


def _unsqueeze(wish: Wish) -> None:
    new = wish.arg(1, "dim") % rank(wish.node)
    if wish.dim == new:
        raise wish.unclear("a dimension of length 1")
    wish.ask(wish.x, wish.dim - (wish.dim > new))


def _stack(wish: Wish) -> None:
    new = wish.arg(1, "dim", 0) % rank(wish.node)
    if wish.dim == new:
        raise wish.unclear("a stack of tensors")
    for operand in tensors(wish.node.args):
        wish.ask(operand, wish.dim - (wish.dim > new))


def _transpose(wish: Wish) -> None:
    count = rank(wish.node)
    order = list(range(count))
    a, b = wish.arg(1, "dim0", 0) % count, wish.arg(2, "dim1", -1) % count
    order[a], order[b] = order[b], order[a]
    wish.ask(wish.x, order[wish.dim])


def _permute(wish: Wish) -> None:
    wish.ask(wish.x, wish.arg(1, "dims")[wish.dim] % rank(wish.node))


def _select(wish: Wish) -> None:
    gone = wish.arg(1, "dim") % rank(wish.x)
    wish.ask(wish.x, wish.dim + (wish.dim >= gone))


def _embedding(wish: Wish) -> None:
    weight, ids = wish.x, wish.arg(1, "indices")
    if wish.dim >= rank(ids):
        raise wish.unclear(f"the width of {wish.run.origin(wish.node)}")
    rows = weight.meta["val"].shape[0]
    if isinstance(wish.size, int) and isinstance(rows, int) and wish.size > rows:
        raise Unclear(f"it would look up {wish.size} positions in the {rows} rows of '{weight.target}'")
    wish.ask(ids, wish.dim)


def _linear(wish: Wish) -> None:
    if wish.from_end == -1:
        wish.ask(wish.arg(1, "weight"), 0)
    else:
        wish.ask(wish.x, wish.dim)


def _matmul(wish: Wish) -> None:
    a, b = wish.x, wish.arg(1, "other")
    if rank(a) < 2 or rank(b) < 2:
        raise wish.unclear("a product with a vector")
    for operand, own in ((a, -2), (b, -1)):
        mine = wish.from_end == own or (wish.from_end < -2 and rank(operand) >= -wish.from_end)
        if mine and not is_one(operand.meta["val"].shape[wish.from_end]):
            wish.ask(operand, wish.from_end)


def _attention(wish: Wish) -> None:
    if wish.from_end != -2:
        raise wish.unclear("the heads or the batch of an attention")
    wish.ask(wish.x, -2)


def _cat(wish: Wish) -> None:
    if wish.dim == wish.arg(1, "dim", 0) % rank(wish.node):
        raise wish.unclear("a concatenation; any of its parts could grow")
    for operand in tensors(wish.node.args):
        wish.ask(operand, wish.dim)


def _index(wish: Wish) -> None:
    x, indices = wish.x, wish.arg(1, "indices")
    places = [i for i, index in enumerate(indices) if index is not None]
    used = [indices[i] for i in places]
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in used):
        raise wish.unclear("the result of indexing with a boolean mask")
    width = max(rank(index) for index in used)
    # As in numpy, index dimensions come first if a slice separates the index tensors.
    together = places == list(range(places[0], places[-1] + 1))
    begin = places[0] if together else 0
    if not begin <= wish.dim < begin + width:
        kept = [i for i in range(rank(x)) if i not in places]
        wish.ask(x, kept[wish.dim if wish.dim < begin else wish.dim - width])
        return
    # From here on `dim` counts from the end, because the index tensors broadcast against each other.
    within = replace(wish, dim=wish.dim - begin - width)
    for index in used:
        if rank(index) >= -within.dim and not is_one(index.meta["val"].shape[within.dim]):
            within.ask(index, within.dim)


def _index_select(wish: Wish) -> None:
    if wish.dim == wish.arg(1, "dim") % rank(wish.x):
        wish.ask(wish.arg(2, "index"), 0)
    else:
        wish.ask(wish.x, wish.dim)


def _gather(wish: Wish) -> None:
    wish.ask(wish.arg(2, "index"), wish.dim)


def _repeat_interleave(wish: Wish) -> None:
    along = wish.arg(2, "dim")
    if along is None or wish.dim == along % rank(wish.x):
        raise wish.unclear("a repeated dimension")
    wish.ask(wish.x, wish.dim)


def _reduce(wish: Wish) -> None:
    dims = wish.arg(1, "dim")
    if dims is None:
        raise wish.unclear("a reduction of all dimensions")
    gone = {d % rank(wish.x) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    kept = [i for i in range(rank(wish.x)) if i not in gone]
    wish.ask(wish.x, wish.dim if rank(wish.node) == rank(wish.x) else kept[wish.dim])


def _item(wish: Wish) -> None:
    """Handle one piece of a split along another dimension."""
    whole = wish.x
    name = packet(whole.target)
    place = {"split": 2, "split_with_sizes": 2, "chunk": 2, "unbind": 1}.get(name)
    if place is None:
        raise wish.unclear(f"one result of {name}")
    pieces = Draft.of(whole)
    x, dim = pieces.args[0], wish.dim
    along = pieces.get(place, "dim", 0) % rank(x)
    if name == "unbind":
        dim += dim >= along
    elif dim == along:
        raise wish.unclear("one piece of a split")
    wish.ask(x, dim)
    # The split itself must be recomputed too, since `ask` only reached its operand.
    wish.run.visit(whole)


_RULES: dict[str, Callable[[Wish], None]] = {
    **dict.fromkeys(("arange", "eye", *FACTORIES), Wish.own),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"), _view),
    **dict.fromkeys(("reshape_as", "view_as"), _reshape_as),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "any", "all", "prod", "argmax", "argmin"), _reduce),
    "cat": _cat,
    "embedding": _embedding,
    "gather": _gather,
    "index": _index,
    "index_select": _index_select,
    "linear": _linear,
    "permute": _permute,
    "python.getitem": _item,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "scaled_dot_product_attention": _attention,
    "select": _select,
    "slice": _slice,
    "stack": _stack,
    "unsqueeze": _unsqueeze,
}
