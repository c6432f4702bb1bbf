"""Which groups of units a target names, each by the op that makes them."""

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
    """Groups whose units one site makes; why: a refusal."""

    site: Site
    groups: tuple[Group, ...] = ()
    why: str = ""


class Makers:
    """Which groups the weight ops of a graph make and take in, and the first that makes each."""

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
            if call.kind == NORM:
                continue
            made = self.run.groups_along(call.node, _features(call))
            self.makes[call.node] = made - self.takes[call.node]
            for number in self.makes[call.node]:
                self.lead.setdefault(number, call)

    def fits(self, number: int) -> bool:
        group = self.run.groups[number]
        return not group.why and group.units > 1 and number in self.lead

    def spent(self) -> bool:
        """Whether there are units that nothing normalises or averages, but one alone in each group."""
        groups = (self.run.groups[number] for number in self.lead)
        return any(group.units == 1 and not (group.why or group.mixed) for group in groups)

    def is_inner(self, number: int) -> bool:
        """Whether nothing normalises or averages its units: their number is nobody else's business."""
        return self.fits(number) and not self.run.groups[number].mixed


def _features(call: Call) -> int:
    if call.kind == CONV or (call.op.layout == "o" and "batch" in str(call.node.target)):
        return 1
    return -2 if call.kind == LINEAR and call.x_axis == "column" else -1


def places(view: View, target: str | None) -> list[Place]:
    """Raises TargetError where a target misses."""
    makers = Makers(view)
    if target is None:
        return _led(view, makers, [number for number in makers.lead if makers.is_inner(number)])
    chosen: set[int] = set()
    unfit: list[tuple[Site, set[int]]] = []
    for site in select_sites(view.sites.sites, target):
        nodes = [call.node for call in site.calls]
        made, taken = (set().union(*(of[n] for n in nodes)) for of in (makers.makes, makers.takes))
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
    """Whether groups within blocks have one unit left each, where none can be removed."""
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
            return f"its units cannot go: {group.why}"
    for group in made:
        if group.units == 1:
            return "its units all depend on each other, so that none can go alone"
    for group in (*made, *others):
        if group.mixed and group.number in makers.lead:
            lead = makers.lead[group.number].module_path
            return f"its units are those of {lead}, which {group.mixed} takes together; target that to remove some"
    return "it makes no units that could be removed, and takes none in"
