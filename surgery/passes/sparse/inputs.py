"""Measurements on data: norms of the inputs of a weight, and the effect of zeros on its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.graph.ops import CONV, LINEAR, arguments, operand
from surgery.graph.sites import Site
from surgery.passes.sparse.axes import Layout


def norms(site: Site) -> Tensor:
    """Return ‖x‖ over all positions of the data, for the input x that each value of a weight multiplies.

    The result is fp32, in the order of `Layout`, with size 1 along axes on which the norms do not depend.
    """
    if site.kind == LINEAR:
        squares = site.probe.products(site).diagonal().view(1, 1, 1, -1)
    elif site.kind == CONV:
        squares = Layout.of(site).laid(_patches(site))
    else:
        squares = _routed(site).view(site.size("e"), 1, 1, -1)
    return squares.sqrt().float()


def output_error(site: Site, weight: Tensor, moved: Tensor) -> float:
    """Return the relative change of a linear layer's outputs on the data when its weight changes.

    Args:
        site: The site of the layer.
        weight: The weight, in the order of `Layout`.
        moved: The change of the weight, in the same order.
    """
    products = site.probe.products(site)

    def energy(laid: Tensor) -> float:
        rows = laid.reshape(-1, laid.shape[-1]).double()
        return float((rows @ products * rows).sum())

    whole = energy(weight)
    return (max(energy(moved), 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _patches(site: Site) -> Tensor:
    """Return Σ x² for each value of a convolution's weight, in its stored layout.

    It is the gradient of Σ conv(x², W) with respect to W, which covers every stride, padding and group.
    """
    nodes = {operand(call) for call in site.calls}
    values = site.probe.values(nodes)
    total = torch.zeros(site.shape, dtype=torch.float64)
    for call in site.calls:
        for value in values[operand(call).name]:
            given = dict(arguments(call.node))
            weight = torch.zeros(site.shape, dtype=torch.float64, device=value.device, requires_grad=True)
            given |= {call.op.x: value.double().square(), call.op.weights[0]: weight}
            if call.op.bias:
                given[call.op.bias] = None
            with torch.enable_grad():
                summed = call.node.target(**given).sum()  # type: ignore[operator]
            total = total.to(value.device) + torch.autograd.grad(summed, weight)[0]
    return total


def _routed(site: Site) -> Tensor:
    """Return Σ x² of each input, for each expert over the rows routed to it: (experts, inputs)."""
    nodes = {n for call in site.calls for n in (operand(call), call.gather) if n is not None}
    values = site.probe.values(nodes)
    total = torch.zeros(site.size("e"), site.size("i"), dtype=torch.float64)
    for call in site.calls:
        for index, value in enumerate(values[operand(call).name]):
            rows = value.transpose(-2, -1) if call.x_axis == "column" else value
            squares = rows.double().square().sum(-2)
            total = total.to(value.device)
            if call.gather is None:
                total += squares
            else:
                total.index_add_(0, values[call.gather.name][index].flatten(), squares)
    return total
