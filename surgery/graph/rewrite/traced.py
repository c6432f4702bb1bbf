"""Functions of tensors as ops: traced once for each function and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from surgery.common.errors import PassError
from surgery.graph.fake import MetaCache


def ops_of(cache: MetaCache, function: Callable[..., Tensor], args: Sequence[Any]) -> fx.Graph:
    """The graph of a function, with a placeholder for each argument that is a node.

    Args:
        cache: Fake results; it keeps the graph for functions that have no closure.
        function: The function; see `Inserter.trace`.
        args: Its arguments: nodes, and numbers.

    Raises:
        PassError: The function cannot be traced, creates a tensor, or returns something else than a tensor.
    """
    plain = hasattr(function, "__code__") and not function.__closure__
    return cache.graph((function, args), lambda: _traced(cache, function, args), keep=plain)


def _traced(cache: MetaCache, function: Callable[..., Tensor], args: Sequence[Any]) -> fx.Graph:
    fakes = [arg.meta["val"] for arg in args if isinstance(arg, fx.Node)]

    def run(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return function(*(next(given) if isinstance(arg, fx.Node) else arg for arg in args))

    name = f"the function {getattr(function, '__qualname__', function)}"
    try:
        # With pre_dispatch, a linear map stays one op, as torch.export leaves it.
        with cache.mode, enable_python_dispatcher(), torch.no_grad():
            graph = make_fx(run, pre_dispatch=True)(*fakes).graph
    except Exception as error:  # the code is a plugin's and can raise anything
        said = next(iter(str(error).strip().splitlines()), "")[:300]
        raise PassError(
            f"{name} cannot be traced into ops ({type(error).__name__}: {said}); write it in torch ops, without "
            "reading values of tensors"
        ) from error
    for node in graph.nodes:
        if node.op == "get_attr" or "device" in node.kwargs:
            raise PassError(f"{name} creates a tensor; declare it in `tensors`, and give it as an argument")
    (result,) = next(reversed(graph.nodes)).args
    if not isinstance(result, fx.Node) or not isinstance(result.meta["val"], Tensor):
        raise PassError(f"{name} must return one tensor")
    return graph


def replay(graph: fx.Graph, nodes: Iterator[fx.Node], call: Callable[..., fx.Node]) -> fx.Node:
    """Insert the ops of a graph that `ops_of` made.

    Args:
        graph: The graph.
        nodes: The values of its placeholders.
        call: Inserts an op.
    """
    made: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
        if node.op == "output":
            return args[0]
        made[node] = next(nodes) if node.op == "placeholder" else call(node.target, *args, **kwargs)
    raise AssertionError("a graph has an output")
