"""Penalties that drive weights to zero, L1 and the group lasso, for use in any training loop.

    penalty = surgery.penalties.group_lasso(program, "conv", 1e-3, over="filters")
    loss = criterion(module(x), y) + penalty()

The gradient of a norm brings values close to zero but not exactly to zero. For exact zeros, leave the term out of the
loss and call `penalty.prox_(rate)` after each optimizer step. Afterwards `Sparse(threshold=0)` keeps the zeros
permanently, and `Filter(source="nonzero")` trains only the remaining values.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from surgery.common.errors import PassError
from surgery.engine.module import ProgramModule
from surgery.engine.program import Program
from surgery.graph.ops import CONV, NORM
from surgery.graph.rewrite.current import weight_reader
from surgery.graph.rewrite.refusals import computed_weight
from surgery.graph.sites import Site
from surgery.graph.targets import select_sites
from surgery.live.state import state_of
from surgery.live.verbs import program_of
from surgery.passes.sparse import Layout, Pattern

aten = torch.ops.aten

Over = Literal["values", "filters", "rows", "columns", "blocks"]


@dataclass(frozen=True)
class _Place:
    """A penalized weight, as its op reads it.

    Attributes:
        path: path of the site, for errors.
        node: graph node of the weight.
        layout: axes of the weight.
        groups: groups of a convolution.
        rows: penalized output rows (None: all), if a target names parts of a fused projection.
        held: mask of the trained values (None: all).
    """

    path: str
    node: fx.Node
    layout: Layout
    groups: int
    rows: tuple[int, ...] | None
    held: Tensor | None


@dataclass(frozen=True)
class Penalty:
    """strength × Σ √|g| ‖w_g‖₂ over groups g of values of the weights.

    With groups of one value this is the L1 norm, strength × Σ |w|. The weights are the effective ones: a masked
    weight counts with its mask, and a sparse update is added to its weight. Parallel adapter branches do not count.

    Attributes:
        module: module whose tensors are read.
        strength: factor of the penalty.
        over: kind of group.
        block: size of a block in outputs × inputs, if `over` is "blocks".
        places: penalized weights.
    """

    module: nn.Module
    strength: float
    over: Over
    block: tuple[int, int]
    places: tuple[_Place, ...]

    def __call__(self) -> Tensor:
        """Return the term to add to the loss. The gradient of a group that is zero is zero."""
        terms = []
        for place in self.places:
            norms, size = self._norms(place, self._laid(place))
            terms.append(norms.sum() * math.sqrt(size))
        return self.strength * torch.stack(terms).sum()

    @property
    def has_steps(self) -> bool:
        """True if `prox_` can be used: each weight is one parameter, with or without a mask."""
        return all(self._stored(place)[0].op == "get_attr" for place in self.places)

    @torch.no_grad()
    def prox_(self, rate: float) -> None:
        """Do the proximal step in place: shrink each trained group by rate × strength × √|g|, but not below zero.

        Args:
            rate: learning rate of the optimizer.

        Raises:
            PassError: the rate is not positive, or a pass computes a weight from several tensors.
        """
        if not rate > 0 or not math.isfinite(rate):
            raise PassError(f"prox_: the learning rate is {rate}; pass a positive number")
        for place in self.places:
            parameter, masks = self._parameter(place)
            if not parameter.requires_grad:
                continue
            laid = self._laid(place)
            norms, size = self._norms(place, laid)
            step = rate * self.strength * math.sqrt(size)
            factor = torch.where(norms > step, 1 - step / norms, torch.zeros_like(norms))
            whole = torch.ones(place.layout.sizes, dtype=laid.dtype, device=laid.device)
            whole[:, slice(None) if place.rows is None else list(place.rows)] = self._spread(
                place, factor, laid
            )
            scaled = parameter * place.layout.stored(whole, tuple(parameter.shape))
            for mask in masks:
                scaled = torch.where(mask, scaled, parameter)
            parameter.copy_(scaled)

    @torch.no_grad()
    def zeros(self) -> tuple[int, int]:
        """Return the number of groups that are exactly zero, and the number of all groups."""
        found = [self._norms(place, self._laid(place))[0] for place in self.places]
        return sum(int((norms == 0).sum()) for norms in found), sum(norms.numel() for norms in found)

    def _laid(self, place: _Place) -> Tensor:
        """Return a weight in the common layout (experts × outputs × kernel × inputs), in float32 at least."""
        value = self._value(place.node)
        laid = place.layout.laid(value if value.dtype == torch.float64 else value.float())
        return laid if place.rows is None else laid[:, list(place.rows)]

    def _value(self, node: fx.Node) -> Any:
        """Evaluate a graph node on the current tensors of the module."""
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.module)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _grouped(self, place: _Place, laid: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Reshape a weight so that each group spans whole axes. Return it and these axes."""
        experts, outputs, kernel, inputs = laid.shape
        if self.over == "columns":
            return laid.reshape(experts, place.groups, outputs // place.groups, kernel, inputs), (2, 3)
        if self.over == "blocks":
            rows, columns = self.block
            return laid.reshape(experts, outputs // rows, rows, kernel, inputs // columns, columns), (2, 5)
        return laid, (2, 3)

    def _norms(self, place: _Place, laid: Tensor) -> tuple[Tensor, int]:
        """Return the norm of each group, and the number of values per group."""
        if self.over == "values":
            return laid.abs(), 1
        grouped, axes = self._grouped(place, laid)
        return torch.linalg.vector_norm(grouped, dim=axes), math.prod(grouped.shape[axis] for axis in axes)

    def _spread(self, place: _Place, factor: Tensor, laid: Tensor) -> Tensor:
        """Expand one factor per group to one factor per value."""
        if self.over == "values":
            return factor
        grouped, axes = self._grouped(place, laid)
        for axis in axes:
            factor = factor.unsqueeze(axis)
        return factor.expand(grouped.shape).reshape(laid.shape)

    def _parameter(self, place: _Place) -> tuple[Tensor, list[Tensor]]:
        """Return the parameter of a weight, and masks of the values that may change."""
        node, over = self._stored(place)
        if node.op != "get_attr":
            raise PassError(
                f"prox_ at {place.path}: a pass computes this weight; add the penalty to the loss instead"
            )
        held = [] if place.held is None else [place.held]
        return self._value(node), [*held, *map(self._value, over)]

    @staticmethod
    def _stored(place: _Place) -> tuple[fx.Node, list[fx.Node]]:
        """Return the node below the masks of a weight, and the masks."""
        node: Any = place.node
        masks = []
        while node.target is aten.where.ScalarOther:
            masks.append(node.args[0])
            node = node.args[1]
        return node, masks


def l1(of: Program | nn.Module, target: str, strength: float) -> Penalty:
    """Make the L1 penalty strength × Σ |w| (the lasso, Tibshirani 1996).

    It also applies to norms: L1 on their scales selects channels (Liu et al. 2017, arXiv:1708.06519).

    Args:
        of: a program, its module, or a live model that carries surgery.
        target: target of the penalized weights.
        strength: factor of the penalty.

    Raises:
        TargetError: the target matches nothing.
        PassError: the strength is not positive, or a weight cannot be penalized.
    """
    return _made(of, target, strength, "values", (1, 1))


def group_lasso(
    of: Program | nn.Module,
    target: str,
    strength: float,
    over: Literal["filters", "rows", "columns", "blocks"] = "filters",
    block: str = "4x4",
) -> Penalty:
    """Make the group lasso strength × Σ √|g| ‖w_g‖₂ (Yuan & Lin 2006). The values of a group become zero together.

    Args:
        of: a program, its module, or a live model that carries surgery.
        target: target of the penalized weights.
        strength: factor of the penalty.
        over: "filters" or "rows" (the weights of one output; a filter of a convolution, a row of a linear layer),
            "columns" (the weights of one input), or "blocks".
        block: size of a block in outputs × inputs, such as "4x4".

    Raises:
        TargetError: the target matches nothing.
        PassError: an option is invalid, or a weight cannot be penalized.
    """
    if over not in ("filters", "rows", "columns", "blocks"):
        raise PassError(f"group_lasso: over is {over!r}; use filters, rows, columns or blocks")
    try:
        size = Pattern.parse(block).block if over == "blocks" else (1, 1)
    except ValueError as error:
        raise PassError(f"group_lasso: {error}") from None
    if over == "blocks" and size == (1, 1):
        raise PassError(f"group_lasso: {block!r} is not a block of outputs by inputs; give one such as 4x4")
    return _made(of, target, strength, over, size)


def _made(
    of: Program | nn.Module, target: str, strength: float, over: Over, block: tuple[int, int]
) -> Penalty:
    """Find the weights of a target and make their penalty. Calls that share a weight count once."""
    if isinstance(strength, bool) or not math.isfinite(strength) or strength <= 0:
        raise PassError(f"the strength of a penalty is {strength}; pass a positive number")
    program, module = _program(of)
    masks = module.__dict__["_masks"]
    places: dict[str, _Place] = {}
    for site in select_sites(program.sites.sites, target):
        if why := _refused(program, site, over, block):
            raise PassError(f"a penalty at {site.path}: {why}")
        node = weight_reader(site.calls[0])[1]
        held = next((masks[n] for n in program.names.get(str(site.weight), ()) if n in masks), None)
        rows = tuple(sorted(row for part in site.selected_parts for row in site.parts[part])) or None
        groups = site.groups if site.kind == CONV else 1
        key = str(node.target) if node.op == "get_attr" else node.name
        places.setdefault(key, _Place(site.path, node, Layout.of(site), groups, rows, held))
    return Penalty(module, float(strength), over, block, tuple(places.values()))


def _program(of: Program | nn.Module) -> tuple[Program, nn.Module]:
    if isinstance(of, Program):
        return of, of.module()
    if isinstance(of, ProgramModule):
        return of.__dict__["_program"], of
    if isinstance(of, nn.Module) and state_of(of) is not None:
        program = program_of(of)
        return program, program.module()
    raise PassError(
        f"a penalty needs a program, its module, or a live model that carries surgery, not a "
        f"{type(of).__name__}; make one with surgery.capture(model, inputs)"
    )


def _refused(program: Program, site: Site, over: Over, block: tuple[int, int]) -> str | None:
    """Return why a weight cannot be penalized, or None."""
    if site.weight is None:
        return computed_weight(site)
    if site.packed or not site.dtype.is_floating_point:
        return "its weight is packed or not floating-point; exclude it with !"
    if site.kind == NORM and over != "values":
        return "a norm has single values and no groups; use l1, or exclude it with !"
    if site.kind == CONV and site.layout == "io" and site.groups > 1 and over != "values":
        return "groups of filters are not supported in a grouped transposed convolution; use l1, or exclude it with !"
    sizes = Layout.of(site).sizes
    if sizes[1] % block[0] or sizes[3] % block[1]:
        return f"blocks of {block[0]}x{block[1]} do not divide {sizes[1]} outputs by {sizes[3]} inputs; change it"
    if not any(program.trains(name) for name in _read(weight_reader(site.calls[0])[1])):
        return "its weight is frozen, so a penalty has no effect; train it, or exclude it with !"
    return None


def _read(node: fx.Node) -> set[str]:
    """Return the names of the tensors a node is computed from."""
    if node.op == "get_attr":
        return {str(node.target)}
    return {name for each in node.all_input_nodes for name in _read(each)}
