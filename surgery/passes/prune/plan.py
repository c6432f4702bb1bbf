"""Selects the units to remove, for all places together, and records them by tensor and axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.graph.ops import CONV, EMBEDDING, NORM
from surgery.graph.sites import Site, SiteKey
from surgery.passes.measure.fisher import fisher
from surgery.passes.prune.costs import Costs
from surgery.passes.prune.coupling import Coupling, Group
from surgery.passes.prune.importance import Value, count_removed, least, rows_of, scores, shared_out
from surgery.passes.prune.places import Place
from surgery.passes.prune.sweep import coupling_of

if TYPE_CHECKING:
    from surgery.graph.sites import Measurements
    from surgery.graph.view import View

# Fraction of the units that every group keeps, if all groups are ranked together.
_LEFT = 0.1


@dataclass(frozen=True)
class Request:
    """Options of PruneFilters."""

    ratio: float
    importance: str
    scope: str
    round_to: int


def refusal(place: Place, request: Request) -> str | None:
    """Return the reason why nothing can be removed at a place, or None."""
    if place.why:
        return place.why
    if request.scope == "local" and not any(_local(group, place.site, request) for group in place.groups):
        group = place.groups[0]
        what, units = _what(place.site, group), group.units
        if request.round_to == 1:
            return f"--ratio {request.ratio:.3g} of its {units} {what} is less than one; raise it"
        return f"with --round-to {request.round_to}, --ratio {request.ratio:.3g} removes none of its {units} {what}"
    return None


def _local(group: Group, site: Site, request: Request) -> int:
    return count_removed(group, request.ratio, request.round_to, rows_of(group, [str(site.weight)]))


def _what(site: Site, group: Group) -> str:
    if site.role.startswith("attn") and rows_of(group, [str(site.weight)]) > 3:
        return "heads"
    return "filters" if site.kind == CONV else "neurons" if site.role.startswith("mlp") else "units"


# -- Selection


def decide(places: Sequence[Place], request: Request, probe: Measurements) -> dict[SiteKey, dict[str, Any]]:
    """Return the journal data of each place that is not refused.

    Args:
        places: places to prune.
        request: options of the pass.
        probe: measurements of the program.
    """
    view = probe.view
    run, accepted = coupling_of(view), [place for place in places if refusal(place, request) is None]
    going = _going(accepted, request, probe)
    costs = Costs(run, view.names)
    keep = torch.ones(len(run.unit_of), dtype=torch.bool)
    for place in accepted:
        for group in place.groups:
            keep[group.of(going[group.number])] = False
    owner = _owners(accepted, keep, view)
    found = {}
    for place in accepted:
        # Each place reports its own savings, so they are computed as if it were pruned alone.
        own = torch.ones_like(keep)
        for group in place.groups:
            own[group.of(going[group.number])] = False
        parameters, macs = costs.saved(own, {group.number for group in place.groups})
        mine = [name for name, key in owner.items() if key == place.site.key]
        groups = [
            {
                "what": _what(place.site, g),
                "units": g.units,
                "rows": rows_of(g, [str(place.site.weight)]),
                "removed": len(going[g.number]),
            }
            for g in place.groups
        ]
        written = _written(run, mine, keep, view.names)
        found[place.site.key] = {
            "groups": groups,
            "saved": {"parameters": parameters, "macs": macs},
            **written,
        }
    return found


def _owners(places: Sequence[Place], keep: Tensor, view: View) -> dict[str, SiteKey]:
    """Map each pruned tensor to the place that records it.

    A weight is recorded by the place that produces its units, so that its bias is recorded at the same place.
    """
    made = {
        coupling_of(view).name(call.weight): call.layout.index("d" if call.kind == EMBEDDING else "o")
        for call in view.calls
        if call.weight is not None
    }
    found: dict[str, SiteKey] = {}
    for place in places:
        for axis in (axis for group in place.groups for axis in group.axes):
            # An axis that loses no index is not recorded.
            if bool(keep[axis.atoms].all()):
                continue
            if axis.axis == made.get(axis.tensor, 0):
                found[axis.tensor] = place.site.key
            else:
                found.setdefault(axis.tensor, place.site.key)
    return found


def _going(places: Sequence[Place], request: Request, probe: Measurements) -> dict[int, Tensor]:
    """Return the units to remove, by group."""
    view = probe.view
    # Taylor scores of all parameters are comparable. For l1 and l2, only weights count, relative to their tensor.
    worth, relative = _worth(request, probe), request.importance != "taylor"
    if relative:
        calls = [call for call in view.calls if call.kind != NORM and call.weight is not None]
        counted = frozenset(coupling_of(view).name(call.weight) for call in calls if call.weight is not None)
    else:
        counted = frozenset(names[0] for names in view.names.values())
    groups = {group.number: (group, place.site) for place in places for group in place.groups}
    found = {n: scores(group, worth, counted, relative) for n, (group, _) in groups.items()}
    if request.scope == "local":
        counts = {n: _local(group, site, request) for n, (group, site) in groups.items()}
    else:

        def allowed(number: int, wanted: int) -> int:
            group, site = groups[number]
            ratio = min(wanted / group.units, 1 - _LEFT)
            return count_removed(group, ratio, request.round_to, rows_of(group, [str(site.weight)]))

        counts = shared_out(found, request.ratio, allowed)
    return {n: least(score, counts[n]) for n, score in found.items()}


def _worth(request: Request, probe: Measurements) -> Value:
    def value(name: str) -> Tensor:
        own = probe.tensor(name).double()
        if request.importance == "l1":
            return own.abs()
        return own.square() if request.importance == "l2" else own.square() * fisher(probe, name)

    return cache(value)


# -- Journal data


def _written(
    run: Coupling, names: Sequence[str], keep: Tensor, parameters: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Return the pruned tensors and the lists of removed indices; equal lists are stored once."""
    lists: dict[tuple[int, ...], int] = {}
    tensors = []
    for name in names:
        value = run.readers[name][0].meta["val"]
        shape, removed = [int(size) for size in value.shape], {}
        for axis in run.axes[name]:
            gone = torch.nonzero(~keep[axis.atoms]).reshape(-1).tolist() if axis is not None else []
            if axis is not None and gone:
                shape[axis.axis] -= len(gone)
                # The journal stores equal index lists once, since all tensors of a residual stream share them.
                removed[str(axis.axis)] = lists.setdefault(tuple(gone), len(lists))
        tensors.append(
            {
                "name": name,
                "shape": shape,
                "dtype": str(value.dtype).removeprefix("torch."),
                "trains": name in parameters,
                "removed": removed,
            }
        )
    return {"removed": [list(one) for one in lists], "tensors": tensors}


def left_of(value: Tensor, known: Mapping[str, Any], lists: Sequence[Sequence[int]]) -> Tensor:
    """Return a tensor without its removed indices.

    Args:
        value: the full tensor.
        known: the tensor's entry in the journal data.
        lists: lists of removed indices.
    """
    for axis, number in known["removed"].items():
        stays = torch.ones(value.shape[int(axis)], dtype=torch.bool, device=value.device)
        stays[list(lists[number])] = False
        value = value.index_select(int(axis), torch.nonzero(stays).reshape(-1))
    return value


def kept_atoms(run: Coupling, sites: Sequence[Site]) -> Tensor:
    """Return a mask of the atoms that are kept, from the journal data of sites."""
    keep = torch.ones(len(run.unit_of), dtype=torch.bool)
    for site in sites:
        for known in site.decided["tensors"]:
            for number, axis in enumerate(run.axes.get(known["name"], ())):
                listed = known["removed"].get(str(number))
                if axis is not None and listed is not None:
                    keep[axis.first + torch.tensor(site.decided["removed"][listed])] = False
    return keep
