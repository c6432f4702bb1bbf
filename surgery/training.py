"""What a graph of train mode runs as: the same values in fewer and cheaper ops.

The captured graph and the journal know nothing of it: it is done to a copy, last, and only for running.

- Whole slices (`x[:]` as tracing writes it) go: eager has none, and their backward fills and copies a tensor.
- The low-rank branches at the linears of one input run as one `lora_linears`: one product with all the A, the
  update added in place to the output that the linear made, and in the backward one gradient of x that every
  product adds to, where autograd keeps a tensor per product and adds them up.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgery.sites import is_aux

aten = torch.ops.aten
END = 2**63 - 1


def tune(graph: fx.Graph) -> fx.Graph:
    """The graph, changed in place, for running in train mode."""
    _drop_whole_slices(graph)
    _group_branches(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


def _drop_whole_slices(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        x, _dim, start, end, step = (*node.args, *(0, 0, END, 1)[len(node.args) - 1 :])
        if (start, end, step) == (0, END, 1) and not node.kwargs:
            node.replace_all_uses_with(x)
            graph.erase_node(node)


@dataclass(frozen=True)
class _Branch:
    """out = linear(x, weight, bias) + scale · (x Aᵀ) Bᵀ, as lowrank.add_branch writes it."""

    out: fx.Node
    linear: fx.Node
    a: fx.Node
    b: fx.Node
    scale: float


def _read(out: fx.Node) -> _Branch | None:
    """The branch that ends at a `view_as`, or None where it is anything else."""
    if not is_aux(out):
        return None
    summed, linear = cast(tuple[fx.Node, fx.Node], out.args)
    if not _is(linear, aten.linear.default) or is_aux(linear) or not _is(summed, aten.addmm.default, 1):
        return None
    flat, flat_hidden, transposed = cast(tuple[fx.Node, ...], summed.args)
    if not (_is(flat, aten.reshape.default, 1) and _is(flat_hidden, aten.reshape.default, 1)):
        return None
    hidden = cast(fx.Node, flat_hidden.args[0])
    if flat.args[0] is not linear or set(linear.users) != {flat, out}:
        return None
    if not (_is(hidden, aten.linear.default, 1) and is_aux(hidden) and _is(transposed, aten.t.default)):
        return None
    x, a = hidden.args[:2]
    b = transposed.args[0]
    attributes = [n for n in (a, b, *linear.args[1:]) if n is not None]
    if x is not linear.args[0] or any(cast(fx.Node, n).op != "get_attr" for n in attributes):
        return None
    return _Branch(
        out, linear, cast(fx.Node, a), cast(fx.Node, b), float(cast(float, summed.kwargs.get("alpha", 1.0)))
    )


def _is(node: Any, target: Any, users: int | None = None) -> bool:
    found = isinstance(node, fx.Node) and node.target is target
    return found and (users is None or len(node.users) == users)


def _group_branches(graph: fx.Graph) -> None:
    writes, epoch = 0, {}
    for node in graph.nodes:
        writes += bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))
        epoch[node] = writes  # two linears with no write between them can move together
    groups: dict[Any, list[_Branch]] = defaultdict(list)
    for out in graph.find_nodes(op="call_function", target=aten.view_as.default):
        found = _read(out)
        if found is not None:
            groups[found.linear.args[0], epoch[found.linear], epoch[out]].append(found)
    for (x, _, _), branches in groups.items():
        _fuse(graph, x, branches)


def _fuse(graph: fx.Graph, x: fx.Node, branches: list[_Branch]) -> None:
    first = min(b.linear for b in branches)
    attributes = [n for b in branches for n in (b.a, b.b, *b.linear.args[1:]) if isinstance(n, fx.Node)]
    for node in sorted(set(attributes)):
        if node > first:
            first.prepend(node)
    with graph.inserting_before(first):
        fused = graph.call_function(
            lora_linears,
            (
                x,
                [b.scale for b in branches],
                [b.linear.args[1] for b in branches],
                [b.linear.args[2] if len(b.linear.args) > 2 else None for b in branches],
                [b.a for b in branches],
                [b.b for b in branches],
            ),
        )
        fused.meta = {k: v for k, v in first.meta.items() if k in ("nn_module_stack", "stack_trace")}
        fused.meta["val"] = tuple(b.out.meta["val"] for b in branches)
        for position, branch in enumerate(branches):
            item = graph.call_function(operator.getitem, (fused, position))
            item.meta = dict(branch.out.meta)
            branch.out.replace_all_uses_with(item)


def lora_linears(
    x: Tensor,
    scales: Sequence[float],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """linear(x, W, bias) + scale · (x Aᵀ) Bᵀ for each of the linears of one input.

    Where something else looks inside (autocast, torch.func, a compiler, tensor subclasses), it is plain ops.
    """
    tensors = (x, *weights, *(t for t in biases if t is not None), *a, *b)
    if (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    ):
        return tuple(
            torch.add(F.linear(x, w, bias), F.linear(F.linear(x, one), two), alpha=scale)
            for scale, w, bias, one, two in zip(scales, weights, biases, a, b, strict=True)
        )
    return _LoraLinears.apply(x, tuple(scales), *weights, *biases, *a, *b)  # type: ignore[no-untyped-call]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, a, b = _quarters(tensors, len(scales))
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ _join(a).t()
        outs = []
        for scale, w, bias, h, up in zip(scales, weights, biases, _split(hidden, a), b, strict=True):
            outs.append(F.linear(flat, w, bias).addmm_(h, up.t(), alpha=scale).view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, hidden, *weights, *a, *b)
        ctx.scales = scales
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.scales)
        x, hidden, *rest = ctx.saved_tensors
        weights, a, b = rest[:count], rest[count : 2 * count], rest[2 * count :]
        flat = x.reshape(-1, x.shape[-1])
        g = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        twice = torch.is_grad_enabled()  # create_graph=True: nothing in place, and nothing kept from forward
        if twice:
            hidden = flat @ _join(a).t()
        need_x, _, *needs = ctx.needs_input_grad
        need_w, need_bias, need_a, need_b = _quarters(needs, count)
        down = [(grad @ up) * scale for grad, up, scale in zip(g, b, ctx.scales, strict=True)]
        joined = torch.cat(down, 1) if count > 1 else down[0]
        grad_x: Tensor | None = None
        if need_x:
            grad_x = joined @ _join(a)
            for grad, w in zip(g, weights, strict=True):
                grad_x = torch.addmm(grad_x, grad, w) if twice else grad_x.addmm_(grad, w)
            grad_x = grad_x.reshape(x.shape)
        grad_a = (joined.t() @ flat).split([one.shape[0] for one in a]) if any(need_a) else [None] * count
        halves = zip(g, _split(hidden, a), ctx.scales, need_b, strict=True)
        grad_b = [(grad.t() @ h) * scale if need else None for grad, h, scale, need in halves]
        grad_w = [grad.t() @ flat if need else None for grad, need in zip(g, need_w, strict=True)]
        grad_bias = [grad.sum(0) if need else None for grad, need in zip(g, need_bias, strict=True)]
        return (grad_x, None, *grad_w, *grad_bias, *grad_a, *grad_b)


def _quarters(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, 4 * size, size)]


def _join(a: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(a)) if len(a) > 1 else a[0]


def _split(hidden: Tensor, a: Sequence[Tensor]) -> Sequence[Tensor]:
    return hidden.split([one.shape[0] for one in a], 1) if len(a) > 1 else (hidden,)
