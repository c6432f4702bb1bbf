"""Forward rules: how the output of an op follows from its inputs, and which of its arguments are sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from surgery.graph.propagate.arguments import Draft
from surgery.graph.propagate.links import FACTORIES, is_broadcast, is_open, links, packet, rank, tensors
from surgery.graph.propagate.run import Run
from surgery.graph.propagate.sizes import (
    Dim,
    Size,
    Unclear,
    expr,
    hint,
    is_one,
    is_size,
    on_data,
    regroup,
    same,
)

aten = torch.ops.aten

# Ops of several tensors whose shapes torch checks itself, in addition to the ops in `links`.
_CHECKED = frozenset([
    "linear", "addmm", "addbmm", "baddbmm", "mm", "bmm", "matmul", "dot", "mv", "einsum", "embedding",
    "prelu", "conv1d", "conv2d", "conv3d", "convolution", "layer_norm", "native_layer_norm", "rms_norm",
    "_fused_rms_norm", "group_norm", "native_group_norm", "_weight_norm", "cat", "concat", "stack", "index",
    "gather", "scaled_dot_product_attention", "index_select", "reshape_as", "view_as",
])  # fmt: skip
# Arguments whose numbers are never lengths.
_NOT_A_SIZE = frozenset([
    "dim", "dims", "dim0", "dim1", "dim2", "start_dim", "end_dim", "groups", "padding_idx", "dilation",
    "index", "source", "destination",
])  # fmt: skip
_ASSERTS = frozenset([
    "_assert_scalar", "_assert_async", "_assert_tensor_metadata", "sym_constrain_range",
    "sym_constrain_range_for_size",
])  # fmt: skip


def follow(run: Run, node: fx.Node, draft: Draft) -> Any:
    """Update the draft's arguments and return the node's new value.

    Args:
        run: the propagation.
        node: node to follow.
        draft: the node's original arguments; updated in place.

    Raises:
        Unclear: if an argument has more than one reading on the new shapes.
    """
    name = packet(draft.target)
    if isinstance(draft.target, torch._ops.OpOverload) and torch.Tag.inplace_view in draft.target.tags:
        moved = any(run.moved(n) for n in tensors(draft.args))
        if moved and name not in ("detach_", "requires_grad_"):
            raise Unclear("it changes the shape of a tensor in place")
    if isinstance(draft.target, torch._ops.HigherOrderOperator):
        raise Unclear("its body is a graph of its own")
    if name in _ASSERTS:
        return _assertion(run, node, draft, name)
    # Operands that must agree come first: a mask or a position table may have to be lengthened before the op runs.
    for places in links(run, name, draft):
        run.agree(node, places)
    rule = _RULES.get(name)
    exact = None
    if rule is not None:
        exact = rule(run, node, draft)
    else:
        _check_plain(run, node, draft, name)
    args = draft.args if exact is None else exact
    # A slice of a longer tensor is not contiguous, and then not every view is possible. A reshape always is.
    if draft.target is aten.view.default and not run.works(draft.target, args, draft.kwargs):
        draft.target = aten.reshape.default
    return run.call(draft.target, args, draft.kwargs, node)


# -- Ops with size arguments. A rule returns the arguments to run with if they differ from the draft's.


def _view(run: Run, node: fx.Node, draft: Draft) -> list[Any]:
    sizes = draft.get(1, "size", draft.get(1, "shape"))
    old = run.before(node).shape
    # The node runs on exact sizes: a -1 among them would be ambiguous for symbolic dimensions.
    dims = regroup(run.dims(draft.args[0]), old, run.products)
    new = list(sizes)
    for i, dim in enumerate(dims):
        if sizes[i] != -1:
            new[i] = run.arguments.fit(sizes[i], dim.new, node)
    draft.args[1] = new
    return [draft.args[0], [d.new for d in dims]]


def _flatten(run: Run, node: fx.Node, draft: Draft) -> None:
    regroup(run.dims(draft.args[0]), run.before(node).shape, run.products)


def _unflatten(run: Run, node: fx.Node, draft: Draft) -> None:
    x, dim, sizes = draft.args[:3]
    first = dim % rank(x)
    dims = regroup(run.dims(x), run.before(node).shape, run.products)[first : first + len(sizes)]
    draft.args[2] = [
        s if s == -1 else run.arguments.fit(s, d.new, node) for s, d in zip(sizes, dims, strict=True)
    ]


def _expand(run: Run, node: fx.Node, draft: Draft) -> None:
    x, sizes = draft.args[0], list(draft.get(1, "size"))
    dims, wanted = run.dims(x), run.wanted.get(node, {})
    lead = len(sizes) - len(dims)
    for i, size in enumerate(sizes):
        found = dims[i - lead] if i >= lead else Dim(1, 1)
        # An argument of -1 keeps the operand's size, whatever that is now.
        if isinstance(size, int) and size == -1 and i >= lead and i not in wanted:
            continue
        if not is_one(found.new):
            sizes[i] = run.arguments.fit(size, found.new, node)
        elif i in wanted:
            sizes[i] = run.arguments.fit(found.new if size == -1 else size, wanted[i], node)
    draft.args[1] = sizes


def _repeat(run: Run, node: fx.Node, draft: Draft) -> None:
    repeats = list(draft.args[1])
    lead = len(repeats) - rank(draft.args[0])
    for i, size in run.wanted.get(node, {}).items():
        if i >= lead and not is_one(draft.args[0].meta["val"].shape[i - lead]):
            continue
        repeats[i] = run.arguments.fit(repeats[i], size, node)
    draft.args[1] = repeats


def _factory(run: Run, node: fx.Node, draft: Draft) -> None:
    place = FACTORIES[packet(draft.target)]
    sizes = list(draft.args[place])
    for i, size in run.wanted.get(node, {}).items():
        sizes[i] = run.arguments.fit(sizes[i], size, node)
    draft.args[place] = sizes


def _eye(run: Run, node: fx.Node, draft: Draft) -> None:
    for dim, size in run.wanted.get(node, {}).items():
        place = min(dim, len(draft.args) - 1)
        draft.args[place] = run.arguments.fit(draft.args[place], size, node)


def _arange(run: Run, node: fx.Node, draft: Draft) -> None:
    size = run.wanted.get(node, {}).get(0)
    if size is None:
        return
    counts = 0 if len(draft.args) == 1 else 1
    # Only a range with step 1 has as many elements as the difference of its ends.
    start, end = (0, draft.args[0]) if counts == 0 else draft.args[:2]
    step = draft.get(2, "step", 1)
    if not (is_size(step) and same(step, 1)) or not is_size(run.arguments.value(end)):
        raise Unclear("its step is not 1")
    draft.args[counts] = run.arguments.fit(end, run.arguments.value(start) + size, node)


def _slice(run: Run, node: fx.Node, draft: Draft) -> None:
    x = draft.args[0]
    along = draft.get(1, "dim", 0) % rank(x)
    start, end = draft.get(2, "start"), draft.get(3, "end")
    # Rules may be visited more than once, so an earlier doubt about this slice is dropped first.
    run.pending.pop(node, None)
    wanted = run.wanted.get(node, {}).get(along)
    if wanted is not None:
        if not is_open(end):
            draft.set(3, "end", run.arguments.fit(end, wanted, node))
        elif isinstance(start, int) and start < 0:
            draft.set(2, "start", run.arguments.fit(start, -wanted, node))
        return
    dim = run.dims(x)[along]
    if not dim.moved:
        return
    for what, bound in (("starts", start), ("ends", end)):
        if bound is None or (what == "ends" and is_open(bound)):
            continue
        was, now = run.arguments.before(bound), run.arguments.value(bound)
        if not same(was, now) or (what == "starts" and same(was, 0)):
            continue
        # A bound that equals the old length, or shares a symbol with it, may be a length or a constant. The
        # refusal waits until the end, because a later request may settle the slice.
        if same(was, dim.old) or same(was, -dim.old) or (_symbols(was) & _symbols(dim.old)):
            run.pending[node] = f"its slice {what} at {was}, which may mean the length {dim.old}→{dim.new}"
        elif what == "ends" and _is_past(was, dim.old) and not _is_past(was, dim.new):
            raise Unclear(f"its slice would cut {dim.new} at {was}")
        elif what == "starts" or not _is_past(was, dim.old):
            # A constant cut (x[:, :5]) stays valid, but its meaning depends on where the sequence grew.
            run.picks.add(node)


def _is_past(end: Size, length: Size) -> bool:
    return hint(end) > hint(length)


def _symbols(size: Size) -> set[Any]:
    return set(expr(size).free_symbols)


def _select(run: Run, node: fx.Node, draft: Draft) -> None:
    x, along, index = draft.args[:3]
    dim = run.dims(x)[along % rank(x)]
    if dim.moved:
        was = run.arguments.before(index)
        still = not isinstance(index, fx.Node) or not run.moved(index)
        # The last element and a fixed position cannot be told apart.
        if still and same(was, dim.old - 1):
            raise Unclear(f"it selects {was}, which may be the last of {dim.old} (now {dim.new})")
        run.picks.add(node)


def _index(run: Run, node: fx.Node, draft: Draft) -> None:
    dims = run.dims(draft.args[0])
    for index, dim in zip(draft.args[1], dims, strict=False):
        if index is not None and dim.moved and not run.moved(index):
            run.picks.add(node)


def _parts(run: Run, node: fx.Node, draft: Draft) -> None:
    x = draft.args[0]
    if packet(draft.target) == "unbind":
        along = draft.get(1, "dim", 0)
    else:
        along = draft.get(2, "dim", 0)
    dim = run.dims(x)[along % rank(x)]
    if dim.moved:
        raise Unclear(
            f"it splits {dim.old}→{dim.new} into parts, and the new elements could belong to any of them"
        )


_RULES: dict[str, Callable[[Run, fx.Node, Draft], list[Any] | None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "view_copy"), _view),
    **dict.fromkeys(FACTORIES, _factory),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split"), _parts),
    "flatten": _flatten,
    "unflatten": _unflatten,
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    "repeat": _repeat,
    "arange": _arange,
    "eye": _eye,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "type_as": lambda run, node, draft: None,  # Takes only the dtype of its second operand.
}


# -- All other ops run unchanged, unless an argument looks like a length.


def _check_plain(run: Run, node: fx.Node, draft: Draft, name: str) -> None:
    operands = tensors((draft.args, draft.kwargs))
    moved = [n for n in operands if run.moved(n)]
    lengths = [d for n in moved for d in run.dims(n) if d.moved]
    if not lengths:
        return
    # `mean` is often traced as a sum and a division by a constant length, which would then be wrong.
    if name.startswith("sum") or name == "einsum":
        _means(run, node, lengths)
    broadcasts = is_broadcast(draft.target)
    if broadcasts or name in _CHECKED:
        whole = any(not n.meta["val"].dtype.is_floating_point for n in moved)
        if broadcasts and whole:
            _numbers(run, draft, lengths)
        return
    if len(operands) > 1:
        for n in operands:
            for found in run.dims(n):
                if not found.moved and any(same(found.old, d.old) for d in lengths):
                    raise Unclear(
                        f"it is not known if '{n.name}', of length {found.old}, has to change as well"
                    )
    _numbers(run, draft, lengths)


def _numbers(run: Run, draft: Draft, lengths: list[Dim]) -> None:
    """Refuse a number that equals the old length: it may be a length or an unrelated number."""
    schema = getattr(draft.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else [""] * len(draft.args)
    given = [*zip(names, draft.args, strict=False), *draft.kwargs.items()]
    for name, value in given:
        if name in _NOT_A_SIZE:
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            was, now = run.arguments.before(item), run.arguments.value(item)
            if is_size(was) and same(was, now) and any(same(was, d.old) for d in lengths):
                length = next(d for d in lengths if same(was, d.old))
                raise Unclear(
                    f"its argument {was} may be the length {length.old}→{length.new} or an unrelated number"
                )


def _means(run: Run, node: fx.Node, lengths: list[Dim]) -> None:
    """Refuse a sum over the sequence that is divided by its old length."""
    olds = [d.old for d in lengths if isinstance(d.old, int)]
    for user in node.users:
        if packet(user.target) in ("div", "div_", "mul", "mul_"):
            for value in user.args[1:]:
                if isinstance(value, (int, float)) and any(value in (old, 1 / old) for old in olds):
                    raise Unclear(f"'{user.name}' divides the sum by {value}, which may be the length")


def _assertion(run: Run, node: fx.Node, draft: Draft, name: str) -> Any:
    """Drop an assertion on a baked size; keep one that still holds."""
    if name == "_assert_tensor_metadata":
        for i, key in ((1, "size"), (2, "stride")):
            if draft.get(i, key) is not None:
                draft.set(i, key, None)
        return None
    value = run.arguments.value(draft.args[0])
    if name.startswith("sym_constrain"):
        low, high = draft.get(1, "min"), draft.get(2, "max")
        holds = on_data(value) or (
            (low is None or low <= hint(value)) and (high is None or hint(value) <= high)
        )
    elif isinstance(value, torch.SymBool):
        holds = not value.node.has_hint() or bool(value)
    else:
        holds = value is not False
    if not holds:
        run.dropped.add(node)
    return node.meta.get("val")


def stale_assertions(graph: fx.Graph, lengths: set[int]) -> list[fx.Node]:
    """Find assertions that compare a data-dependent size with a length that no longer exists."""
    return [
        n
        for n in graph.nodes
        if packet(n.target) == "_assert_scalar"
        and isinstance(n.args[0], fx.Node)
        and any(type(a) is int and a in lengths for a in n.args[0].args)
    ]
