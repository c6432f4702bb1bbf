"""Coupling rule of convolutions: input channels, output channels, and the groups that separate them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from surgery.graph.propagate.links import packet
from surgery.passes.prune.coupling import Coupling
from surgery.passes.prune.labels import Labels, covered, sizes_of, where
from surgery.passes.prune.products import Term, aligned, merge, product, split_letters


def convolution(run: Coupling, node: fx.Node, given: dict[str, Any]) -> Labels:
    """Return the labels of a convolution, and couple its input channels with those of its weight.

    Args:
        run: the analysis.
        node: the convolution.
        given: its arguments by name.
    """
    x, weight, turned = given["input"], given["weight"], "transpose" in packet(node.target)
    sizes, rank = sizes_of(x), len(sizes_of(weight))
    if len(sizes) != rank:
        return run.unknown(node, "its input has no batch")
    slides = f"{where(node)} slides along it"
    entering, held = (run.whole_along(run.labels.get(n, ()), range(2, rank), slides) for n in (x, weight))
    # Capital letters for the kernel: its axes are not the spatial axes of the input, and are not summed with them.
    spatial, kernel = split_letters(rank - 2), split_letters(rank - 2).upper()
    into, shape = ("io", [1, 0]) if turned else ("oi", [0, 1])
    groups = given["groups"]
    # An ordinary convolution is a matrix product over channels, so the rule of products applies.
    if groups == 1:
        terms = [
            Term(entering, [*sizes[:2], *[1] * (rank - 2)], "bi" + spatial),
            Term(held, [*sizes_of(weight)[:2], *[1] * (rank - 2)], into + kernel),
        ]
        found = product(run, terms, "bo" + spatial, where(node))
    else:
        made, taken = (_axis(held, axis) for axis in shape)
        for label in held:
            if covered(label) == {0, 1}:
                run.freeze(label, f"{where(node)} has it in several dimensions of its weight")
        found = _grouped(run, node, entering, made, taken, groups, turned)
    bias = given["bias"]
    if bias is None:
        return found
    own = sizes_of(node)
    return merge(run, [(found, own), aligned(run, node, bias, at=1)], own, where(node), defer=True)


def _axis(labels: Labels, axis: int) -> Tensor | None:
    return next((label.reshape(-1) for label in labels if covered(label) == {axis}), None)


def _grouped(
    run: Coupling,
    node: fx.Node,
    labels: Labels,
    made: Tensor | None,
    taken: Tensor | None,
    groups: int,
    turned: bool,
) -> Labels:
    """Couple the channels of a grouped convolution: whole groups are removed, or the same positions of each group.

    Of the two, the rule takes the one that leaves more units to choose from.

    Args:
        run: the analysis.
        node: the convolution.
        labels: labels of its input.
        made: the weight's atoms of output channels; the weight has one per output channel, or with `turned` one per
            output channel of a group.
        taken: the weight's atoms of input channels; the other way round.
        groups: number of groups.
        turned: True for a transposed convolution.
    """
    why = f"{where(node)} ties it to channels that cannot shrink"
    here = _axis(labels, 1)
    for label in labels:
        if 1 in covered(label) and covered(label) != {1}:
            run.freeze(label, f"{where(node)} takes channels of several dimensions")
    rank, total = len(sizes_of(node)), sizes_of(node.args[0])[1]  # type: ignore[arg-type]
    inside, outside = total // groups, sizes_of(node)[1] // groups
    entering = here.reshape(groups, inside) if here is not None else None
    if turned:
        inner = taken.reshape(groups, inside) if taken is not None else None
        outer = made.expand(groups, outside) if made is not None else None
        if entering is not None and inner is not None:
            run.couple(entering, inner)
    else:
        inner = taken.expand(groups, inside) if taken is not None else None
        outer = made.reshape(groups, outside) if made is not None else None
    # Whole groups can be removed if there are many small ones (depthwise); else the same positions of each group.
    whole = groups >= max(inside, outside) and not turned
    if entering is None and outer is not None and whole:
        run.freeze(outer, why)
    if whole:
        # The weight's input axis is shared by all groups, so it keeps its size when a group is removed.
        if taken is not None:
            run.freeze(taken, f"{where(node)} has it in every group")
        if entering is not None and outer is not None:
            first = entering[:, :1]
            run.couple(entering, first)
            run.couple(outer, first)
        elif entering is not None:
            run.freeze(entering, why)
    else:
        for side in (entering, outer):
            if side is not None:
                run.couple(side, side[:1])
        if entering is not None and inner is not None:
            run.couple(entering, inner)
        elif entering is not None or inner is not None:
            run.freeze(entering if entering is not None else inner, why)  # type: ignore[arg-type]
    if outer is None:
        return []
    return [outer.reshape([1, -1, *[1] * (rank - 2)])]
