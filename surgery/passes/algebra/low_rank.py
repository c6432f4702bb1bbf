"""Low-rank branches on every kind of weight: their shapes, their graph and their merge.

For a weight seen as a matrix W (out × in), the branch gives y + s·B(A x) with A (r × in) and B (out × r), and the merge
W + s·B A. A convolution applies A with the base's kernel, stride and groups, and B pointwise. An embedding looks up
rows of Aᵀ. Stacked experts select A and B by the expert numbers of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgery.engine.contract.folds import Fold
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, arguments
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site

aten = torch.ops.aten
# Arguments of a convolution op after x, weight and bias.
CONV_ARGUMENTS = ("stride", "padding", "dilation", "groups")


def factor_shapes(
    site: Site, rank: int, rows: int | None = None, across: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B.

    Args:
        site: The site.
        rank: r; of a convolution, per group.
        rows: Number of output features that the branch covers; all by default.
        across: A of a grouped convolution reads the channels of all groups; r is then their total.
    """
    out = site.out_features if rows is None else rows
    if site.kind == CONV:
        groups, kernel = site.groups, site.float_shape[2:]
        if across:
            return (rank, groups * site.float_shape[1], *kernel), (out, rank // groups, *(1 for _ in kernel))
        return (rank * groups, site.float_shape[1], *kernel), (out, rank, *(1 for _ in kernel))
    if site.kind == EXPERTS:
        return (site.size("e"), rank, site.in_features), (site.size("e"), out, rank)
    return (rank, site.in_features), (out, rank)


def branch(
    site: Site,
    g: Rewriter,
    a: fx.Node,
    b: fx.Node,
    bias: fx.Node | None = None,
    x: fx.Node | None = None,
) -> fx.Node:
    """Insert B(A x) + bias, in the shape of the site's output, with as many features as B has rows.

    Args:
        site: The site.
        g: The rewriter at a call of the site.
        a: Graph value of A.
        b: Graph value of B.
        bias: Graph value of a bias, or None.
        x: Input of the branch; None is `g.x`.
    """
    return _up(site, g, _down(site, g, a, x or g.x), b, bias)


def add_branch(
    site: Site,
    g: Rewriter,
    a: fx.Node,
    b: fx.Node,
    scale: float,
    x: fx.Node | None = None,
    out: fx.Node | None = None,
) -> fx.Node:
    """Insert out + scale · B(A x); for a linear map, one fused addmm.

    Args:
        site: The site.
        g: The rewriter at a call of the site.
        a: Graph value of A.
        b: Graph value of B.
        scale: Factor of the branch.
        x: Input of the branch; None is `g.x`.
        out: The value to add to; None is `g.output`.
    """
    out = out or g.output
    hidden = _down(site, g, a, x or g.x)
    if site.kind in (CONV, EXPERTS, EMBEDDING):
        return g.call(aten.add.Tensor, out, _up(site, g, hidden, b), alpha=scale)
    transposed = g.call(aten.t.default, b)
    if out.meta["val"].dim() == 2:
        return g.call(aten.addmm.default, out, hidden, transposed, alpha=scale)
    # addmm takes matrices. A size of -1 avoids the product of symbolic batch and sequence sizes.
    flat_out = g.call(aten.reshape.default, out, [-1, site.out_features])
    flat_hidden = g.call(aten.reshape.default, hidden, [-1, _last(b)])
    summed = g.call(aten.addmm.default, flat_out, flat_hidden, transposed, alpha=scale)
    return g.call(aten.view_as.default, summed, out)


def add_rows(
    site: Site,
    g: Rewriter,
    branches: Sequence[tuple[fx.Node, Sequence[int]]],
    scale: float,
    out: fx.Node | None = None,
) -> fx.Node:
    """Insert out + scale · (branch outputs at their output features, zero elsewhere).

    Args:
        site: The fused projection.
        g: The rewriter at a call of the site. For interleaved rows, the pass has the tensor `rows_N` from
            `gather_index`, where N is the first of them.
        branches: Output of each branch, with the output features (rows) that it has.
        scale: Factor of the branches.
        out: The value to add to; None is `g.output`.
    """
    value = out or g.output
    total, spatial = site.out_features, len(site.float_shape) - 2 if site.kind == CONV else 0
    inner = [0, 0] * spatial  # no padding of the axes after the features
    for update, rows in branches:
        first, last = rows[0], rows[-1]
        if is_run(rows):
            placed = g.call(aten.constant_pad_nd.default, update, [*inner, first, total - last - 1])
        else:
            # Output features that the branch does not cover read an extra column of zeros.
            padded = g.call(aten.constant_pad_nd.default, update, [*inner, 0, 1])
            placed = g.call(aten.index_select.default, padded, -1 - spatial, g[f"rows_{first}"])
        value = g.call(aten.add.Tensor, value, placed, alpha=scale)
    return value


def is_run(rows: Sequence[int]) -> bool:
    """True if rows are consecutive."""
    return list(rows) == list(range(rows[0], rows[-1] + 1))


def gather_index(rows: Sequence[int], total: int) -> Tensor:
    """Index that places a branch at interleaved rows: for each output feature, the column of the branch output.

    Features that the branch does not cover get the column after the last, which `add_rows` pads with zeros. The index
    is int64 of shape (total,).
    """
    index = torch.full((total,), len(rows), dtype=torch.int64)
    index[torch.tensor(list(rows))] = torch.arange(len(rows))
    return index


def _last(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _down(site: Site, g: Rewriter, a: fx.Node, x: fx.Node) -> fx.Node:
    if site.kind == EMBEDDING:
        return product(site, g, x, g.call(aten.t.default, a), "vd")
    return product(site, g, x, a, "eoi" if site.kind == EXPERTS else "oi")


def product(site: Site, g: Rewriter, x: fx.Node, weight: fx.Node, layout: str) -> fx.Node:
    """Insert the site's op on another input with another weight and no bias.

    Args:
        site: The site; its stride, padding and so on are kept.
        g: The rewriter at a call of the site.
        x: The input.
        weight: Graph value of the weight.
        layout: Axes of that weight by their letters, such as "oi"; see `Site.layout`.
    """
    call = g.site_call
    if site.kind == EMBEDDING:
        return g.call(aten.embedding.default, weight, x, arguments(call.node).get("padding_idx", -1))
    if site.kind == CONV:
        args = [arguments(call.node)[name] for name in CONV_ARGUMENTS]
        # A weight over more channels than the base's has fewer groups.
        args[3] = site.groups * site.float_shape[1] // int(weight.meta["val"].shape[1])
        op = _conv(site, args[1]) if site.packed else call.node.target
        return g.call(op, x, weight, None, *args)
    if site.kind == EXPERTS:
        gathered = g.call(aten.index_select.default, weight, 0, call.gather) if call.gather else weight
        wanted = "eoi" if call.x_axis == "column" else "eio"
        turned = gathered if layout == wanted else g.call(aten.transpose.int, gathered, 1, 2)
        return g.call(aten.matmul.default, *((turned, x) if call.x_axis == "column" else (x, turned)))
    return g.call(*((aten.linear.default, x, weight) if layout == "oi" else (aten.matmul.default, x, weight)))


def lacks(site: Site) -> str | None:
    """Name of an argument that the op of a packed convolution lacks and a branch needs, or None."""
    given = arguments(site.calls[0].node)
    return next((name for name in CONV_ARGUMENTS if name not in given), None)


def _conv(site: Site, padding: Any = 0) -> Any:
    """torch's convolution op with as many spatial axes; for padding as a word ("same"), the overload that takes it."""
    packet = (aten.conv1d, aten.conv2d, aten.conv3d)[len(site.float_shape) - 3]
    return packet.padding if isinstance(padding, str) else packet.default


def _up(site: Site, g: Rewriter, hidden: fx.Node, b: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    if site.kind == CONV:
        spatial = len(site.float_shape) - 2
        return g.call(_conv(site), hidden, b, bias, [1] * spatial, [0] * spatial, [1] * spatial, site.groups)
    if site.kind == EXPERTS:
        return product(site, g, hidden, b, "eoi")
    return g.call(aten.linear.default, hidden, b, *((bias,) if bias is not None else ()))


@dataclass(frozen=True)
class AddLowRank(Fold):
    """Merge: W ← W + scale · B A, in place, in the layout of the weight.

    Attributes:
        site: The site.
        a: The factor A.
        b: The factor B.
        scale: Factor of B A.
        rows: Output features covered; None for all.
    """

    site: Site
    a: Tensor
    b: Tensor
    scale: float
    rows: tuple[int, ...] | None = None

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        site, a, b = self.site, self.a.detach().to(weight.dtype), self.b.detach().to(weight.dtype)
        if site.kind == CONV:
            groups = site.groups
            matrix = weight.view(groups, weight.shape[0] // groups, -1)
            left = b.reshape(groups, b.shape[0] // groups, -1)
            right = a.reshape(groups, a.shape[0] // groups, -1)
            if self.rows is None:
                matrix.baddbmm_(left, right, alpha=self.scale)
            else:  # parts have branches only in convolutions of one group
                index = torch.tensor(self.rows, device=weight.device)
                matrix[0].index_add_(0, index, left[0] @ right[0], alpha=self.scale)
            return weight
        if site.kind == EXPERTS:
            matrix = weight if site.layout == "eoi" else weight.transpose(1, 2)
            matrix.baddbmm_(b, a, alpha=self.scale)
            return weight
        # A matrix with outputs as rows; an embedding (v, d) and GPT-2's Conv1D (i, o) are stored transposed.
        matrix = weight if site.layout == "oi" else weight.t()
        if self.rows is None:
            if site.layout == "oi":
                weight.addmm_(b, a, alpha=self.scale)
            else:
                weight.addmm_(a.t(), b.t(), alpha=self.scale)
            return weight
        index = torch.tensor(self.rows, device=weight.device)
        matrix.index_add_(0, index, b @ a, alpha=self.scale)
        return weight
