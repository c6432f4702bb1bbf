"""Named outputs of a graph: reading and adding them, and propagating an output of another width."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from surgery.common.errors import PassError
from surgery.graph.analysis.dataflow import op_name

if TYPE_CHECKING:
    from surgery.graph.fake import MetaCache

# Name of the output of a model that returns a single tensor.
ONLY = "output"

# Reductions remove an axis and do not depend on its length.
_REDUCTIONS = {
    "argmax",
    "argmin",
    "max",
    "min",
    "amax",
    "amin",
    "sum",
    "mean",
    "logsumexp",
    "norm",
    "any",
    "all",
}
_REDUCTIONS |= {"topk", "prod", "std", "var", "sym_size", "linalg_vector_norm"}


def named_outputs(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the graph's outputs by name, as in ONNX: the keys of a dict, or `0`, `1` for a tuple."""
    leaves, spec = _returned(graph)
    value = pytree.tree_unflatten(leaves, spec)
    if isinstance(value, fx.Node):
        return {ONLY: value}
    paths, _ = pytree.tree_flatten_with_path(value)
    return {".".join(map(_key, path)): leaf for path, leaf in paths if isinstance(leaf, fx.Node)}


def add_output(graph: fx.Graph, name: str, node: fx.Node) -> None:
    """Add an output to the graph: a new key of a dict, or the last item of a tuple or list.

    A single tensor becomes {"output": tensor, name: node}.

    Args:
        graph: graph to change.
        name: name of the new output.
        node: value of the new output.

    Raises:
        PassError: if the name is taken, or the outputs have any other structure.
    """
    leaves, spec = _returned(graph)
    value = _with(pytree.tree_unflatten(list(range(len(leaves))), spec), name, len(leaves))
    order, fresh = pytree.tree_flatten(value)
    (returned,) = graph.output_node().args
    container: Any = type(returned) if isinstance(returned, (tuple, list)) else tuple
    graph.output_node().args = (container([*leaves, node][i] for i in order),)
    codegen: Any = graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=fresh)


def refuse_output(graph: fx.Graph, name: str) -> str | None:
    """Return the reason why no output of that name can be added, or None."""
    leaves, spec = _returned(graph)
    try:
        _with(pytree.tree_unflatten(list(range(len(leaves))), spec), name, len(leaves))
    except PassError as error:
        return str(error)
    return None


def _returned(graph: fx.Graph) -> tuple[list[Any], Any]:
    (returned,) = graph.output_node().args
    info = getattr(graph._codegen, "pytree_info", None)
    if info is not None and info.out_spec is not None:
        return list(pytree.tree_leaves(returned)), info.out_spec
    raise PassError(
        "the graph does not store the names of its outputs; capture the model with surgery.capture"
    )


def _with(value: Any, name: str, leaf: int) -> Any:
    if type(value) is dict:
        if name in value:
            raise PassError(f"the model returns {name!r} already; choose another name")
        return {**value, name: leaf}
    if type(value) in (tuple, list):
        return type(value)([*value, leaf])
    if isinstance(value, int):
        return {ONLY: value, name: leaf}
    raise PassError(
        f"the model returns a {type(value).__name__}, to which no output can be added; let it return a dict"
    )


def _key(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))))


def follow(graph: fx.Graph, changed: Mapping[fx.Node, Any], cache: MetaCache) -> dict[fx.Node, Any]:
    """Compute the new `val` of every node that depends on values of another width, without changing the graph.

    Args:
        graph: graph to propagate through.
        changed: new `val` of each changed node, with one axis of another length.
        cache: fake mode to run ops in.

    Returns:
        New `val` by node.

    Raises:
        PassError: if an op depends on the old length: it fails, or its result differs in more than that axis.
    """
    found = dict(changed)
    widths = {_step(node.meta["val"], val) for node, val in changed.items()}
    for node in graph.nodes:
        if node.op != "call_function" or node in changed or found.keys().isdisjoint(node.all_input_nodes):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: found.get(n, n.meta.get("val")))
        try:
            with _quiet(), cache.mode, torch.no_grad():
                val = node.target(*args, **kwargs)
        except Exception as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise PassError(f"{_place(node)} depends on the old size ({why[0][:120]})") from None
        old = node.meta.get("val")
        # A result of the old shape is right for a reduction; any other op must have cut the new elements off.
        if _alike(old, val):
            if isinstance(old, torch.Tensor) and op_name(node.target) not in _REDUCTIONS:
                raise PassError(f"{_place(node)} cuts the values to the old size")
            continue
        if not _follows(old, val, widths):
            raise PassError(f"{_place(node)} depends on the old size")
        found[node] = val
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's log of an op that fails on its shapes, because here a failure is an expected result."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _place(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return f"op {op_name(node.target)}{f' ({lines[-1]})' if lines else ''}"


def _step(old: Any, new: Any) -> tuple[int, int]:
    return next((int(a), int(b)) for a, b in zip(old.shape, new.shape, strict=True) if not same_size(a, b))


def same_size(a: Any, b: Any) -> bool:
    """True for equal sizes. Expressions of symbolic ones are compared, since their `==` would add a guard."""
    symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
    plain, other = (size.node.expr if isinstance(size, symbolic) else size for size in (a, b))
    return bool(plain == other)


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return old.dim() == new.dim() and all(
            same_size(a, b) for a, b in zip(old.shape, new.shape, strict=True)
        )
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(_alike(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(old, (int, torch.SymInt)) and isinstance(new, (int, torch.SymInt)):
        return same_size(old, new)
    return old is None and new is None


def _follows(old: Any, new: Any, widths: set[tuple[int, int]]) -> bool:
    """True if a result differs only in one of the changed lengths."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.dim() == new.dim():
        moved = [(a, b) for a, b in zip(old.shape, new.shape, strict=True) if not same_size(a, b)]
        return len(moved) == 1 and moved[0] in widths
    if isinstance(old, int) and isinstance(new, int):
        return (old, new) in widths
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)) and len(old) == len(new):
        # Values and indices, as returned by sort or topk.
        return all(_alike(a, b) or _follows(a, b, widths) for a, b in zip(old, new, strict=True))
    return False
