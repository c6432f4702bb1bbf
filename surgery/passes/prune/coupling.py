"""Coupling analysis: finds the tensor indices that must be removed together, by sending labels through the graph.

Every index along an axis of a tensor of the program is an *atom*. A value of the graph carries *labels*: arrays of
atoms with the value's rank, of size 1 along dimensions that they do not depend on. An element of a value disappears as
soon as an atom of one of its labels is removed. Layout ops run on the labels as they run on the values. Products, sums
and norms couple the atoms that meet in them (see surgery.passes.prune.rules). Coupled atoms form a *unit*: a filter, a
neuron, or a head with its rows of q, k and v and its columns of the output projection. Units that lie on the same axes,
with equally many indices on each, form a *group*, whose units can be ranked against each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from surgery.graph.marks import is_aux
from surgery.graph.ops import parameter_of
from surgery.graph.propagate.links import tensors
from surgery.passes.prune.labels import Labels, carries, covered, first_of, shrunk, where


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor of the program. Its atoms are numbered from `first`."""

    tensor: str
    axis: int
    first: int
    size: int

    @property
    def atoms(self) -> Tensor:
        return torch.arange(self.first, self.first + self.size)


@dataclass(frozen=True)
class Group:
    """Units that can be ranked against each other.

    Attributes:
        number: number of the group.
        units: number of units.
        axes: axes that the units lie on.
        atoms: atoms of all units.
        unit: the unit of each atom, counted from 0.
        mixed: op that computes with all units together (a norm, a mean), or empty.
        why: reason why no unit can be removed, or empty.
    """

    number: int
    units: int
    axes: tuple[Axis, ...]
    atoms: Tensor
    unit: Tensor
    mixed: str = ""
    why: str = ""

    def of(self, units: Tensor) -> Tensor:
        """Return the atoms of some units."""
        return self.atoms[torch.isin(self.unit, units)]

    def on(self, axis: Axis) -> tuple[Tensor, Tensor]:
        """Return the group's indices on one of its axes, and the unit of each."""
        here = (self.atoms >= axis.first) & (self.atoms < axis.first + axis.size)
        return self.atoms[here] - axis.first, self.unit[here]


class Coupling:
    """Coupling analysis of one graph.

    Rules report through `couple`, `freeze`, `keep_whole`, `defer` and `mix`. Units are formed in `resolve`, because
    they are known only after all rules have run.

    Attributes:
        graph: the graph.
        axes: axes of every tensor, by the tensor's first name.
        readers: nodes that read each tensor, or a replacement of it.
        labels: labels of every node.
        parts: labels of each result of a node with several results.
        unit_of: the smallest atom of each atom's unit.
        group_of: number of each atom's group, or -1.
        groups: all groups.
    """

    def __init__(self, graph: fx.Graph, names: Mapping[str, tuple[str, ...]]) -> None:
        self.graph, self._names = graph, names
        self.axes: dict[str, list[Axis | None]] = {}
        self.readers: dict[str, list[fx.Node]] = defaultdict(list)
        self.labels: dict[fx.Node, Labels] = {}
        self.parts: dict[fx.Node, list[Labels]] = {}
        self._count = 0
        # Atoms that are known so far to be kept.
        self._stays = torch.zeros(0, dtype=torch.bool)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._frozen: list[tuple[Tensor, str]] = []
        self._whole: list[tuple[Tensor, set[int], str]] = []
        self._deferred: list[tuple[Tensor, Tensor, str]] = []
        self._mixed: list[tuple[Tensor, str]] = []
        # Labels that depend on several dimensions.
        self._joint: dict[tuple[int, ...], Tensor] = {}
        self.unit_of = torch.zeros(0, dtype=torch.long)
        self.group_of = torch.zeros(0, dtype=torch.long)
        self.groups: list[Group] = []

    def resolve(self) -> None:
        """Form units and groups from the reports of all rules. Called once, after the sweep (see `sweep.couple`)."""
        self.unit_of = torch.arange(self._count)
        self._resolve()
        self.groups = self._group()
        self.group_of = torch.full((self._count,), -1)
        for group in self.groups:
            self.group_of[group.atoms] = group.number

    def name(self, node: fx.Node) -> str:
        """Return the first name of the tensor that a get_attr node reads."""
        return self._names.get(str(node.target), (str(node.target),))[0]

    def groups_along(self, node: fx.Node, dim: int) -> set[int]:
        """Return the numbers of the groups that lie along a dimension of a value."""
        found: set[int] = set()
        for label in self.labels.get(node, ()):
            if label.shape[dim % label.dim()] > 1:
                found |= set(self.group_of[label.reshape(-1)].unique().tolist())
        return found - {-1}

    # -- Reports of the rules

    def couple(self, a: Tensor, b: Tensor) -> None:
        """Couple two arrays of atoms element by element, with broadcasting."""
        a, b = torch.broadcast_tensors(a, b)
        self._pairs.append((a.reshape(-1), b.reshape(-1)))

    def freeze(self, label: Tensor, why: str) -> None:
        """Keep all atoms of a label. why: reason, for refusals."""
        self._frozen.append((label.reshape(-1), why))
        self._stays[label.reshape(-1)] = True

    def keep_whole(self, label: Tensor, dims: Iterable[int], why: str) -> None:
        """Keep all indices along some dimensions of a label; along its other dimensions units may be removed.

        Args:
            label: the label.
            dims: dimensions that must keep their size.
            why: reason, for refusals.
        """
        dims = set(dims) & covered(label)
        # A label whose dimensions all stay is frozen at once; the other case waits until its units are known.
        if dims == covered(label):
            self.freeze(label, why)
        elif dims:
            self._whole.append((label, dims, why))

    def defer(self, joint: Tensor, part: Tensor, why: str) -> None:
        """Couple two labels later, if the units turn out to lie along the dimensions that `part` depends on.

        Args:
            joint: label that depends on more dimensions.
            part: label that meets it in an op and depends on fewer dimensions. It is frozen if it cannot be coupled.
            why: reason, for refusals.
        """
        self._deferred.append((joint, part, why))

    def mix(self, label: Tensor, op: str) -> None:
        """Record that an op computes with all atoms of a label together."""
        self._mixed.append((label.reshape(-1), op))

    def fresh(self, size: int, why: str) -> Tensor:
        """Return new atoms that belong to no tensor and are never removed."""
        label = torch.arange(self._count, self._count + size)
        self._number(size)
        self.freeze(label, why)
        return label

    def _number(self, size: int) -> None:
        self._count += size
        # The array grows by doubling, since ops add atoms one tensor at a time.
        if self._count > len(self._stays):
            self._stays = torch.cat([self._stays, self._stays.new_zeros(self._count)])

    def reduced(self, label: Tensor, dims: set[int], op: str) -> Tensor | None:
        """Return the label after an op that sums, averages or normalizes over dimensions.

        Units that lie along the other dimensions are coupled over the reduced ones, so each is removed as a whole. A
        label without other dimensions ends here, and its atoms are recorded as mixed.

        Args:
            label: label of the op's input.
            dims: dimensions that the op reduces.
            op: the op, for refusals.
        """
        gone = dims & covered(label)
        if not gone:
            return label
        left = first_of(label, gone)
        if covered(label) - gone:
            self.couple(label, left)
            return left
        self.mix(label, op)
        return None

    def whole_along(self, labels: Iterable[Tensor], dims: Iterable[int], why: str) -> Labels:
        """Return the labels after an op that slides, pools or resizes along some dimensions.

        A view can split features into channels and positions: their label then depends on both. The positions of such
        a channel are coupled, since they can only be removed together. A label of positions alone is frozen.

        Args:
            labels: labels of the op's input.
            dims: dimensions that the op acts along.
            why: reason, for refusals.
        """
        found = []
        for label in labels:
            gone = set(dims) & covered(label)
            left = first_of(label, gone)
            if gone and not covered(left):
                self.freeze(label, why)
                continue
            if gone:
                self.couple(label, left)
            found.append(left)
        return found

    # -- Notes of the sweep

    def unknown(self, node: fx.Node, why: str) -> Labels:
        """Freeze all labels that enter a node without a rule; its result carries no label."""
        for operand in tensors((node.args, node.kwargs)):
            for label in self.labels.get(operand, ()):
                self.freeze(label, why if is_aux(node) else f"{where(node)}: {why}")
        return []

    def checked(self, node: fx.Node, labels: Labels) -> Labels:
        """Drop labels whose atoms are all kept. Later ops then see a dimension that cannot shrink."""
        labels = [one for one in map(shrunk, labels) if covered(one) and not bool(self._stays[one].all())]
        for label in labels:
            if len(covered(label)) > 1:
                self._joint.setdefault(_key(label), label)
        return labels

    def tensor_labels(self, node: fx.Node) -> Labels:
        """Return the labels of a tensor of the program: one for each axis, with new atoms on the first visit."""
        value, name = node.meta.get("val"), self.name(node)
        if not isinstance(value, Tensor):
            return []
        if name not in self.axes:
            axes: list[Axis | None] = []
            for axis, size in enumerate(value.shape):
                # Atoms need a fixed number of indices; a dimension of length 1 cannot shrink.
                fixed = isinstance(size, int) and size > 1
                axes.append(Axis(name, axis, self._count, size) if fixed else None)
                self._number(size if fixed else 0)
            self.axes[name] = axes
        self.readers[name].append(node)
        rank = value.dim()
        # A tensor that a pass has replaced here was made for the present number of units.
        if parameter_of(node) is not None:
            self.freeze(torch.cat([a.atoms for a in self.axes[name] if a is not None]), carries(node))
        return [
            a.atoms.reshape([-1 if d == a.axis else 1 for d in range(rank)])
            for a in self.axes[name]
            if a is not None
        ]

    # -- Units

    def _resolve(self) -> None:
        """Form units: apply all couplings, and choose the dimension along which the units of each joint label lie."""
        self._join(self._pairs)
        held = {_key(label): dims for label, dims, _ in self._whole}
        # Labels with a dimension that must stay whole come first, because they have fewer choices; the others follow.
        for key in sorted(self._joint, key=lambda one: one not in held):
            self._choose(self._joint[key], held.get(key, set()))
        for joint, part, why in self._deferred:
            along = covered(shrunk(self.unit_of[joint]))
            if along and along <= covered(part):
                self._join([(joint.reshape(-1), part.expand(joint.shape).reshape(-1))])
            else:
                self.freeze(part, why)
        for label, dims, why in self._whole:
            # Only now is it known along which dimension the units lie.
            if covered(shrunk(self.unit_of[label])) & dims:
                self.freeze(label, why)

    def _choose(self, label: Tensor, whole: set[int]) -> None:
        """Couple a label's atoms so that its units lie along one dimension, the one with most units.

        Removing units along two dimensions at once would leave holes instead of a smaller block.
        """
        units = self.unit_of[label]
        dims = covered(shrunk(units))
        if len(dims) < 2:
            return
        best: tuple[int, list[tuple[Tensor, Tensor]]] | None = None
        for d in sorted(dims - whole):
            rows = units.movedim(d, 0).reshape(units.shape[d], -1)
            pairs = [(rows.reshape(-1), rows[:, :1].expand_as(rows).reshape(-1))]
            # Try the dimension: couple everything along the others, and count the units that remain.
            count = len(_components(self.unit_of, pairs)[rows[:, 0]].unique())
            if best is None or count > best[0]:
                best = count, pairs
        if best is None:
            self.freeze(label, "none of the dimensions that its units lie along can shrink")
        else:
            self._join(best[1])

    def _join(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        if pairs:
            self.unit_of = _components(self.unit_of, pairs)

    def _group(self) -> list[Group]:
        """Form groups: units with the same axes, equally many indices on each, and the same removability."""
        axes = [axis for found in self.axes.values() for axis in found if axis is not None]
        axis_of = torch.full((self._count,), -1)
        for number, axis in enumerate(axes):
            axis_of[axis.first : axis.first + axis.size] = number
        atoms = torch.nonzero(axis_of >= 0).reshape(-1)
        units, unit = self.unit_of[atoms].unique(return_inverse=True)
        why = self._said(self._frozen)
        alike: dict[tuple[bool, tuple[tuple[int, int], ...]], list[int]] = defaultdict(list)
        lies: dict[int, list[tuple[int, int]]] = defaultdict(list)
        keys, counts = (unit * len(axes) + axis_of[atoms]).unique(return_counts=True)
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            lies[key // len(axes)].append((key % len(axes), count))
        frozen = torch.isin(units, torch.tensor(list(why), dtype=units.dtype)).tolist()
        for number, signature in lies.items():
            alike[frozen[number], tuple(signature)].append(number)
        return self._from(axes, alike, atoms, unit, why)

    def _from(
        self,
        axes: list[Axis],
        alike: Mapping[tuple[bool, tuple[tuple[int, int], ...]], list[int]],
        atoms: Tensor,
        unit: Tensor,
        why: Mapping[int, str],
    ) -> list[Group]:
        """Build the groups, ordered so that groups on connected axes follow one another.

        Args:
            axes: all axes.
            alike: units by (frozen, signature), where a signature lists (axis, number of indices).
            atoms: all atoms that lie on an axis.
            unit: unit number of each of these atoms.
            why: reason for keeping a unit, by its smallest atom.
        """
        dependency: nx.Graph = nx.Graph()
        for _, signature in alike:
            on = [number for number, _ in signature]
            nx.add_path(dependency, on) if len(on) > 1 else dependency.add_node(on[0])
        rank = {n: i for i, part in enumerate(nx.connected_components(dependency)) for n in part}
        count = int(unit.max()) + 1 if len(unit) else 0
        place, number_in = torch.full((count,), -1), torch.zeros(count, dtype=torch.long)
        ordered = sorted(alike.items(), key=lambda item: (rank[item[0][1][0][0]], item[1][0]))
        for number, (_, members) in enumerate(ordered):
            place[members] = number
            number_in[members] = torch.arange(len(members))
        order = torch.argsort(place[unit], stable=True)
        bounds = torch.bincount(place[unit], minlength=len(ordered)).cumsum(0).tolist()
        mixed = self._said(self._mixed)
        found = []
        for number, ((_, signature), members) in enumerate(ordered):
            here = order[(bounds[number - 1] if number else 0) : bounds[number]]
            own = set(self.unit_of[atoms[here]].unique().tolist())
            found.append(
                Group(
                    number,
                    len(members),
                    tuple(axes[n] for n, _ in signature),
                    atoms[here],
                    number_in[unit[here]],
                    next((mixed[u] for u in sorted(own) if u in mixed), ""),
                    next((why[u] for u in sorted(own) if u in why), ""),
                )
            )
        return found

    def _said(self, notes: Iterable[tuple[Tensor, str]]) -> dict[int, str]:
        """Map units to the text reported for them; the first report wins."""
        found: dict[int, str] = {}
        for label, text in notes:
            for unit in self.unit_of[label].unique().tolist():
                found.setdefault(unit, text)
        return found


def _key(label: Tensor) -> tuple[int, ...]:
    return (*label.shape, *label.reshape(-1).tolist())


def _components(known: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the smallest member of each atom's connected component.

    Args:
        known: result for earlier pairs.
        pairs: further connections.
    """
    a = torch.cat([left for left, _ in pairs])
    b = torch.cat([right for _, right in pairs])
    least = known
    # Propagate minima along all pairs at once and shorten chains, until nothing changes. This takes a logarithmic
    # number of vectorized rounds, while a union-find in Python would loop over millions of atoms.
    while True:
        lower = torch.minimum(least[a], least[b])
        following = least.clone()
        for side in (least[a], least[b], a, b):
            following.scatter_reduce_(0, side, lower, "amin")
        while not torch.equal(following, following[following]):
            following = following[following]
        if torch.equal(following, least):
            return least
        least = following
