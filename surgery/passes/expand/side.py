"""Side branches: parallel to an op and zero at first, either dense or convolutional over the positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, NORM, arguments, per_axis
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra.low_rank import lacks
from surgery.passes.algebra.nonlinearities import ACTIVATIONS

if TYPE_CHECKING:
    from surgery.graph.analysis.attention import Attention
    from surgery.graph.sites import Measurements
    from surgery.graph.view import View

aten = torch.ops.aten


_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class Branch:
    """Options of a side branch. kernel: None for the site's own kernel, or 3 along a sequence."""

    side: str
    size: int
    kernel: int | None
    activation: str
    causal: str

    @property
    def along(self) -> int:
        """Kernel length along a sequence."""
        return self.kernel or 3


# -- Checks and decisions


def check(branch: Branch, site: Site, view: View) -> str | None:
    """Return the reason why a site cannot have this side branch, or None.

    Args:
        branch: options of the branch.
        site: site to check.
        view: the program.
    """
    if site.kind == EXPERTS:
        return "stacked experts cannot have a side branch; target the router or the attention, or use lora"
    if site.kind in (EMBEDDING, NORM):
        return f"an op of kind {site.kind} has no matrix that a branch could be added to; target a linear or a conv"
    if not site.float_dtype.is_floating_point:
        return f"its weight is {site.dtype}; a side branch needs a floating-point stream"
    if site.kind == CONV:
        return _check_conv(branch, site)
    if any(call.x_axis == "column" for call in site.calls):
        return "it multiplies from the left, so its features are not the last axis; target its neighbours"
    if branch.side == "conv":
        if any(call.x.meta["val"].dim() != 3 for call in site.calls):
            rank = site.calls[0].x.meta["val"].dim()
            return f"its input has {rank} axes, and none of them is a sequence to convolve along; use --side dense"
        if branch.causal == "no" and branch.along % 2 == 0:
            return f"--kernel {branch.along} has no middle; use an odd one, or --causal yes"
    return None


def _check_conv(branch: Branch, site: Site) -> str | None:
    if site.layout == "io":
        return "a transposed convolution cannot have a side branch; target its neighbours"
    if site.packed and (lacking := lacks(site)):
        return f"its op {site.op} has no argument {lacking}, so the shape of a parallel branch is unknown"
    for call in site.calls:
        if _padding(branch, site, arguments(call.node)) is None:
            kernel = "×".join(str(size) for size in site.float_shape[2:])
            # The padding p + d(k' − k)/2 must be whole and not negative, hence the conditions on k'.
            odd = "of the same parity and at least that size"
            asked = 1 if branch.side == "dense" else branch.kernel
            remedy = "use --side conv" if branch.side == "dense" else f"give a --kernel {odd}"
            return (
                f"with a kernel of {asked} instead of {kernel}, no padding gives the same positions; {remedy}"
            )
    return None


def _kernel(branch: Branch, site: Site) -> tuple[int, ...]:
    own = tuple(site.float_shape[2:])
    asked = 1 if branch.side == "dense" else branch.kernel
    return own if asked is None else tuple(asked for _ in own)


def _padding(branch: Branch, site: Site, args: dict[str, Any]) -> Any:
    """Return the padding with which the branch's kernel gives the positions of the op, or None if there is none.

    out = ⌊(n + 2p − d(k − 1) − 1)/s⌋ + 1 is the same for k' with p' = p + d(k' − k)/2.
    """
    given, kernel, own = args["padding"], _kernel(branch, site), site.float_shape[2:]
    if isinstance(given, str):
        return given if given == "same" or kernel == tuple(own) else None
    before, dilation = (per_axis(value, len(own)) for value in (given, args["dilation"]))
    twice = [2 * p + d * (k - o) for p, d, k, o in zip(before, dilation, kernel, own, strict=True)]
    return None if any(t < 0 or t % 2 for t in twice) else [t // 2 for t in twice]


def decide(branch: Branch, site: Site, view: View, probe: Measurements) -> dict[str, Any]:
    """Return the journal data of a site: sizes, kernel and causality of its branch.

    Args:
        branch: options of the branch.
        site: site of the branch.
        view: the program.
        probe: measurements of the program.
    """
    known: dict[str, Any] = {"in": site.in_features * site.groups, "out": site.out_features}
    if site.kind == CONV:
        known["kernel"] = list(_kernel(branch, site))
    elif branch.side == "conv":
        known["causal"] = branch.causal == "yes" or (
            branch.causal == "auto" and not _looks_ahead(site, view, probe)
        )
        # An even kernel has no middle, so the branch must be causal; `check` has refused --causal no.
        if branch.along % 2 == 0:
            known["causal"] = True
    return known


def _looks_ahead(site: Site, view: View, probe: Measurements) -> bool:
    """True if a self-attention in the site's row of blocks lets a position see later ones.

    Without such an attention the branch must not look ahead.
    """
    nodes = {call.node for call in site.calls}
    rows = [{n for block in row for n in block.nodes} for row in view.blocks]
    row = next((inside for inside in rows if not nodes.isdisjoint(inside)), None)
    attentions = [a for a in view.attentions if not a.cross and (row is None or a.core[-1] in row)]
    seen = (probe.once(("sees later", a.core[-1].name), partial(_sees_later, a, probe)) for a in attentions)
    return any(seen)


def _sees_later(attention: Attention, probe: Measurements) -> bool:
    """True if the mask or the attention weights let a position see later ones, on the first set of data."""
    core = attention.core
    if len(core) == 1:
        args = arguments(core[0])
        if args.get("is_causal"):
            return False
        mask = args.get("attn_mask")
        if not isinstance(mask, fx.Node):
            return True
        value = probe.values([mask])[mask.name][0]
        open_ = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
    else:
        weights = core[1] if len(core) == 3 else core[0]
        value = probe.values([weights])[weights.name][0]
        open_ = value != 0 if len(core) == 3 else value > torch.finfo(value.dtype).min / 2
    later = torch.ones(open_.shape[-2:], dtype=torch.bool, device=open_.device).triu(1)
    return bool((open_ & later).any())


# -- Tensors and graph


def tensors(branch: Branch, site: Site) -> dict[str, TensorSpec]:
    """Return the tensors of a branch. `up` starts at zero, so the branch adds nothing at first."""
    known, size = site.decided, branch.size
    kernel = tuple(known.get("kernel", ()))
    points = tuple(1 for _ in kernel)
    specs = {
        "down": TensorSpec((size, known["in"], *kernel), _spread),
        "down_bias": TensorSpec((size,)),
        "up": TensorSpec((known["out"], size, *points)),
        "up_bias": TensorSpec((known["out"],)),
    }
    if "causal" in known:
        specs["along"] = TensorSpec((size, 1, branch.along), _spread)
        specs["along_bias"] = TensorSpec((size,))
    return specs


def _spread(tensor: Tensor) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def rewrite(branch: Branch, site: Site, g: Rewriter) -> None:
    """Add the branch to the output of every call of a site.

    Args:
        branch: options of the branch.
        site: site of the branch.
        g: rewriter of the graph.
    """
    for call in site.calls:
        with g.at_call(call):
            g.wrap(call.node, partial(_add_branch, branch, site, g, g.x))


def _add_branch(branch: Branch, site: Site, g: Rewriter, x: fx.Node, value: fx.Node) -> fx.Node:
    out = _conv(branch, site, g, x) if site.kind == CONV else _linear(branch, site, g, x)
    return g.call(aten.add.Tensor, value, out, alpha=g.weight)


def _conv(branch: Branch, site: Site, g: Rewriter, x: fx.Node) -> fx.Node:
    args = arguments(g.site_call.node)
    padding = _padding(branch, site, args)
    hidden = g.call(
        g.site_call.node.target, x, g["down"], g["down_bias"], args["stride"], padding, args["dilation"], 1
    )
    return g.call(_CONVS[len(site.float_shape) - 3], _bend(branch, g, hidden), g["up"], g["up_bias"])


def _linear(branch: Branch, site: Site, g: Rewriter, x: fx.Node) -> fx.Node:
    hidden = g.call(aten.linear.default, x, g["down"], g["down_bias"])
    if "causal" in site.decided:
        # conv1d pads both ends alike, so a one-sided (causal) padding is inserted before it.
        turned = g.call(aten.transpose.int, hidden, 1, 2)
        padding = _before(branch, site.decided["causal"])
        if padding[0] != padding[1]:
            turned, padding = g.call(aten.constant_pad_nd.default, turned, list(padding)), (0, 0)
        weights = g["along"], g["along_bias"]
        turned = g.call(aten.conv1d.default, turned, *weights, [1], [padding[0]], [1], branch.size)
        hidden = g.call(aten.transpose.int, turned, 1, 2)
    return g.call(aten.linear.default, _bend(branch, g, hidden), g["up"], g["up_bias"])


def _before(branch: Branch, causal: bool) -> Sequence[int]:
    """Return the number of zeros before and after the sequence."""
    return (branch.along - 1, 0) if causal else (branch.along // 2, branch.along // 2)


def _bend(branch: Branch, g: Rewriter, value: fx.Node) -> fx.Node:
    return g.call(ACTIVATIONS[branch.activation], value)
