"""Groups of units that a target selects, each with the op that produces its units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from surgery.graph.graphs import live_nodes
from surgery.graph.marks import is_aux
from surgery.graph.ops import CONV, LINEAR, NORM, Call, operand
from surgery.graph.sites import Site, SiteKey
from surgery.graph.targets import select_sites
from surgery.passes.prune.coupling import Coupling, Group
from surgery.passes.prune.labels import carries
from surgery.passes.prune.sweep import coupling_of

if TYPE_CHECKING:
    from surgery.graph.view import View


@dataclass(frozen=True)
class Place:
    """Groups whose units one site produces. why: reason for a refusal, or empty."""

    site: Site
    groups: tuple[Group, ...] = ()
    why: str = ""


class Makers:
    """Groups that the weight ops of a graph produce and read.

    Attributes:
        run: coupling analysis of the graph.
        makes: groups that each op produces.
        takes: groups that each op reads.
        lead: the first op that produces each group.
    """

    def __init__(self, view: View) -> None:
        self.run: Coupling = coupling_of(view)
        live = live_nodes(view.graph)
        self.makes: dict[fx.Node, set[int]] = defaultdict(set)
        self.takes: dict[fx.Node, set[int]] = defaultdict(set)
        self.lead: dict[int, Call] = {}
        for call in view.calls:
            if call.node not in live:
                continue
            self.takes[call.node] = self.run.groups_along(operand(call), _features(call))
            # A norm acts on units but does not produce them.
            if call.kind == NORM:
                continue
            made = self.run.groups_along(call.node, _features(call))
            # A residual add or a depthwise op passes groups through; such an op does not produce them.
            self.makes[call.node] = made - self.takes[call.node]
            for number in self.makes[call.node]:
                self.lead.setdefault(number, call)

    def fits(self, number: int) -> bool:
        """True if units of the group can be removed, and an op is known that produces them."""
        group = self.run.groups[number]
        return not group.why and group.units > 1 and number in self.lead

    def spent(self) -> bool:
        """True if some group that no norm or mean mixes has one unit left."""
        groups = (self.run.groups[number] for number in self.lead)
        return any(group.units == 1 and not (group.why or group.mixed) for group in groups)

    def is_inner(self, number: int) -> bool:
        """True if no norm or mean mixes the group's units, so their number affects no other values."""
        return self.fits(number) and not self.run.groups[number].mixed


def _features(call: Call) -> int:
    """Return the feature dimension of an op's input and output."""
    if call.kind == CONV or (call.op.layout == "o" and "batch" in str(call.node.target)):
        return 1
    return -2 if call.kind == LINEAR and call.x_axis == "column" else -1


def places(view: View, target: str | None) -> list[Place]:
    """Return the groups that a target selects, with the site that produces them.

    Args:
        view: the program.
        target: target text, or None for all groups that no norm or mean mixes.

    Raises:
        TargetError: if a term of the target matches no site.
    """
    makers = Makers(view)
    if target is None:
        return _led(view, makers, [number for number in makers.lead if makers.is_inner(number)])
    chosen: set[int] = set()
    unfit: list[tuple[Site, set[int]]] = []
    for site in select_sites(view.sites.sites, target):
        nodes = [call.node for call in site.calls]
        made, taken = (set().union(*(of[n] for n in nodes)) for of in (makers.makes, makers.takes))
        # A site stands for the groups it produces. A group mixed by norms (the residual stream) is taken only if the
        # site is the first that produces it, else every layer would remove features of the whole stream.
        found = {
            number
            for number in made
            if makers.is_inner(number) or (makers.fits(number) and makers.lead[number].node in nodes)
        } or {number for number in taken if makers.is_inner(number)}
        chosen |= found
        if not found:
            unfit.append((site, made | taken))
    led = _led(view, makers, sorted(chosen))
    own = {place.site.key for place in led}
    refused = [
        Place(view.site_of(site.calls[0].node), (), _reason(site, makers, touched))
        for site, touched in unfit
        if touched.isdisjoint(chosen) and site.key not in own
    ]
    order = {site.key: index for index, site in enumerate(view.sites)}
    return sorted([*led, *refused], key=lambda place: order[place.site.key])


def are_spent(view: View) -> bool:
    """True if the groups inside blocks have one unit left each, and none can be removed."""
    return Makers(view).spent()


def _led(view: View, makers: Makers, numbers: Iterable[int]) -> list[Place]:
    found: dict[SiteKey, tuple[Site, list[Group]]] = {}
    for number in numbers:
        site = view.site_of(makers.lead[number].node)
        found.setdefault(site.key, (site, []))[1].append(makers.run.groups[number])
    return [Place(site, tuple(groups)) for site, groups in found.values()]


def _reason(site: Site, makers: Makers, touched: set[int]) -> str:
    nodes = [call.node for call in site.calls]
    under = next(
        (n for node in nodes for n in node.all_input_nodes if n.op == "call_function" and is_aux(n)), None
    )
    if under is not None:
        return carries(under)
    made = [makers.run.groups[n] for n in sorted(set().union(*(makers.makes[n] for n in nodes)))]
    others: Sequence[Group] = [makers.run.groups[n] for n in sorted(touched)]
    for group in (*made, *others):
        if group.why:
            return f"its units cannot be removed: {group.why}"
    for group in made:
        if group.units == 1:
            return "its units all depend on each other, so none can be removed alone"
    for group in (*made, *others):
        if group.mixed and group.number in makers.lead:
            lead = makers.lead[group.number].module_path
            return f"its units are those of {lead}, and {group.mixed} combines them; target {lead} to remove some"
    return "it neither produces nor reads units that can be removed"
