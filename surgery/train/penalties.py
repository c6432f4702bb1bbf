"""Penalties that let training decide which values of weights are zero: L1 and the group lasso, for any loop's loss.

    penalty = surgery.penalties.group_lasso(program, "conv", 1e-3, over="filters")
    loss = criterion(module(x), y) + penalty()

A gradient of a norm brings values near zero and never to it. For exact zeros leave the term out of the loss and take
the proximal step in its place, after the optimiser's: `penalty.prox_(rate)`. Then
`Sparse(threshold=0)` makes what is left the support, for good, and `Filter(source="nonzero")` lets it alone train.
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
from surgery.graph.sites import Site
from surgery.graph.targets import select_sites
from surgery.live.state import state_of
from surgery.live.verbs import program_of
from surgery.passes.sparse import Layout, Pattern

aten = torch.ops.aten

Over = Literal["values", "filters", "rows", "columns", "blocks"]


@dataclass(frozen=True)
class _Place:
    """A weight as its op reads it. node: what it reads. rows: outputs that count (None: all), where a target names
    parts of a fused projection. held: the tensor that says which of its values train (None: all)."""

    path: str
    node: fx.Node
    layout: Layout
    groups: int
    rows: tuple[int, ...] | None
    held: Tensor | None


@dataclass(frozen=True)
class Penalty:
    """strength × Σ √|g| ‖w_g‖₂ over groups g of the values of weights (of one value each: the L1 norm Σ |w|).

    module: whose tensors are read. The weights are those that the ops read: of a sparse one what its mask leaves, of
    one with a sparse update their sum; what adapters add beside an op does not count.
    """

    module: nn.Module
    strength: float
    over: Over
    block: tuple[int, int]
    places: tuple[_Place, ...]

    def __call__(self) -> Tensor:
        """The term to add to the loss; a group that is zero has no gradient from it."""
        terms = []
        for place in self.places:
            norms, size = self._norms(place, self._laid(place))
            terms.append(norms.sum() * math.sqrt(size))
        return self.strength * torch.stack(terms).sum()

    @property
    def has_steps(self) -> bool:
        """Whether `prox_` can be taken: each of its weights is one parameter, masked or not."""
        return all(self._stored(place)[0].op == "get_attr" for place in self.places)

    @torch.no_grad()
    def prox_(self, rate: float) -> None:
        """The proximal step, in place, of what trains now: each group shrinks by rate × strength × √|g|, or is zero.

        rate: the optimiser's learning rate. Raises PassError where a pass computes the weight from several tensors.
        """
        if not rate > 0 or not math.isfinite(rate):
            raise PassError(f"prox_ takes the learning rate, a positive number, and it is {rate}")
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
        """How many of its groups are exactly zero, and how many there are."""
        found = [self._norms(place, self._laid(place))[0] for place in self.places]
        return sum(int((norms == 0).sum()) for norms in found), sum(norms.numel() for norms in found)

    def _laid(self, place: _Place) -> Tensor:
        value = self._value(place.node)
        laid = place.layout.laid(value if value.dtype == torch.float64 else value.float())
        return laid if place.rows is None else laid[:, list(place.rows)]

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.module)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _grouped(self, place: _Place, laid: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The laid-out weight as a view with the axes of a group, and which these are."""
        experts, outputs, kernel, inputs = laid.shape
        if self.over == "columns":
            return laid.reshape(experts, place.groups, outputs // place.groups, kernel, inputs), (2, 3)
        if self.over == "blocks":
            rows, columns = self.block
            return laid.reshape(experts, outputs // rows, rows, kernel, inputs // columns, columns), (2, 5)
        return laid, (2, 3)

    def _norms(self, place: _Place, laid: Tensor) -> tuple[Tensor, int]:
        """The norm of each group, and how many values a group has."""
        if self.over == "values":
            return laid.abs(), 1
        grouped, axes = self._grouped(place, laid)
        return torch.linalg.vector_norm(grouped, dim=axes), math.prod(grouped.shape[axis] for axis in axes)

    def _spread(self, place: _Place, factor: Tensor, laid: Tensor) -> Tensor:
        """One value for each of a laid-out weight from one for each group."""
        if self.over == "values":
            return factor
        grouped, axes = self._grouped(place, laid)
        for axis in axes:
            factor = factor.unsqueeze(axis)
        return factor.expand(grouped.shape).reshape(laid.shape)

    def _parameter(self, place: _Place) -> tuple[Tensor, list[Tensor]]:
        """The parameter of a place, and the masks outside of which it stays as it is."""
        node, over = self._stored(place)
        if node.op != "get_attr":
            raise PassError(
                f"prox_ at {place.path}: a pass computes its weight there; add the penalty to the loss instead"
            )
        held = [] if place.held is None else [place.held]
        return self._value(node), [*held, *map(self._value, over)]

    @staticmethod
    def _stored(place: _Place) -> tuple[fx.Node, list[fx.Node]]:
        """The node under the masks of a place, and these."""
        node: Any = place.node
        masks = []
        while node.target is aten.where.ScalarOther:
            masks.append(node.args[0])
            node = node.args[1]
        return node, masks


def l1(of: Program | nn.Module, target: str, strength: float) -> Penalty:
    """strength × Σ |w| over the weights that the target names (the lasso, Tibshirani 1996).

    of: a program, its module, or a live model that carries surgery. Of norms too: with L1 on their scales training
    decides on channels (Liu et al. 2017, arXiv:1708.06519). Raises TargetError, PassError.
    """
    return _made(of, target, strength, "values", (1, 1))


def group_lasso(
    of: Program | nn.Module,
    target: str,
    strength: float,
    over: Literal["filters", "rows", "columns", "blocks"] = "filters",
    block: str = "4x4",
) -> Penalty:
    """strength × Σ √|g| ‖w_g‖₂ over groups of the values of each weight (Yuan & Lin 2006): these become zero together.

    over: filters, or rows, which is the same (all that makes one output: a filter of a convolution, a row of a linear
    map); columns (all that one input enters); blocks (of outputs by inputs, such as 4x4). The rest as for `l1`.
    """
    if over not in ("filters", "rows", "columns", "blocks"):
        raise PassError(f"group_lasso is over filters, rows, columns or blocks, and not {over!r}")
    try:
        size = Pattern.parse(block).block if over == "blocks" else (1, 1)
    except ValueError as error:
        raise PassError(f"group_lasso: {error}") from None
    if over == "blocks" and size == (1, 1):
        raise PassError(f"group_lasso: {block!r} is no block of outputs by inputs; give one such as 4x4")
    return _made(of, target, strength, over, size)


def _made(
    of: Program | nn.Module, target: str, strength: float, over: Over, block: tuple[int, int]
) -> Penalty:
    if isinstance(strength, bool) or not math.isfinite(strength) or strength <= 0:
        raise PassError(f"a penalty's strength is a positive number, and it is {strength}")
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
        f"a penalty is of a program, its module, or a live model that carries surgery, and this is a "
        f"{type(of).__name__}; surgery.capture(model, inputs) makes a program of one"
    )


def _refused(program: Program, site: Site, over: Over, block: tuple[int, int]) -> str | None:
    if site.weight is None:
        return f"its weight is computed from {', '.join(site.computed_from)}; target those"
    if site.packed or not site.dtype.is_floating_point:
        return "its weight is packed or no floating-point one; leave it out with !"
    if site.kind == NORM and over != "values":
        return "a norm has no groups, only single values; use l1, or leave it out with !"
    if site.kind == CONV and site.layout == "io" and site.groups > 1 and over != "values":
        return (
            "a transposed convolution with groups has no filters of its own; use l1, or leave it out with !"
        )
    sizes = Layout.of(site).sizes
    if sizes[1] % block[0] or sizes[3] % block[1]:
        return f"it has {sizes[1]} outputs by {sizes[3]} inputs, which blocks of {block[0]}x{block[1]} do not divide"
    if not any(program.trains(name) for name in _read(weight_reader(site.calls[0])[1])):
        return "nothing of its weight trains, so that a penalty does nothing; let it train, or leave it out with !"
    return None


def _read(node: fx.Node) -> set[str]:
    """Names of the tensors from which a value is computed."""
    if node.op == "get_attr":
        return {str(node.target)}
    return {name for each in node.all_input_nodes for name in _read(each)}
