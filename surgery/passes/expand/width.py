"""Wider: repeats units of hidden layers, and divides their outgoing weights so that the output stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.ops import CONV, EXPERTS, arguments
from surgery.graph.rewrite.current import tensors_now
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site, SiteKey
from surgery.graph.targets import select_sites
from surgery.passes.expand.hidden import Hidden, find_hidden

if TYPE_CHECKING:
    from surgery.graph.sites import Measurements
    from surgery.graph.view import View


@dataclass(frozen=True)
class Place:
    """Hidden layers that one site reads (several, if layers share their weights). why: reason for a refusal."""

    site: Site
    layers: tuple[Hidden, ...]
    why: str = ""


# -- Selection of layers


def places(view: View, target: str | None) -> list[Place]:
    """Return the hidden layers that a target selects, by the ops that produce their units or else by the reader.

    Raises:
        TargetError: if a term of the target matches no site.
    """
    layers = find_hidden(view)
    if target is None:
        found = _merged(view, [layer for layer in layers if _is_usual(layer, view)])
    else:
        found = _named(view, layers, select_sites(view.sites.sites, target))
    return _without_overlap(found)


def _without_overlap(found: Sequence[Place]) -> list[Place]:
    """Refuse the second of two layers that share an op: its weight would be widened along both axes at once."""
    ops: dict[fx.Node, Place] = {}
    result = []
    for place in found:
        nodes = {call.node for layer in place.layers for call in (*layer.ups, layer.down)}
        other = next((ops[n] for n in nodes if n in ops), None)
        if other is not None and not place.why:
            why = f"one of its ops is already widened with {other.site.path}; widen it in a second expand, with --as"
            place = Place(place.site, place.layers, why)
        if not place.why:
            ops.update(dict.fromkeys(nodes, place))
        result.append(place)
    return result


def _is_usual(layer: Hidden, view: View) -> bool:
    """True for the hidden layer of an MLP, or for channels within one residual branch of a convolutional network."""
    if layer.down.kind != CONV:
        return view.site_of(layer.down.node).role == "mlp.down"
    nodes = {layer.down.node, *(call.node for call in layer.ups)}
    return any(nodes <= set(branch.ops) for branch in view.branches)


def _merged(view: View, layers: Sequence[Hidden]) -> list[Place]:
    by_site: dict[SiteKey, tuple[Site, list[Hidden]]] = {}
    for layer in layers:
        site = view.site_of(layer.down.node)
        by_site.setdefault(site.key, (site, []))[1].append(layer)
    return [Place(site, tuple(found), _differences(found)) for site, found in by_site.values()]


def _differences(layers: Sequence[Hidden]) -> str:
    why = next((layer.why for layer in layers if layer.why), "")
    if not why and len({tuple(_tensors_of(layer)) for layer in layers}) > 1:
        why = "its calls read units that different weights produce; target layers that do not share it"
    return why


def _tensors_of(layer: Hidden) -> list[str]:
    return [str(node.target) for node, *_ in _widened(layer)]


def _named(view: View, layers: Sequence[Hidden], chosen: Sequence[Site]) -> list[Place]:
    makes = {call.node: layer for layer in layers for call in layer.ups}
    takes = {layer.down.node: layer for layer in layers}
    found: dict[int, Hidden] = {}
    unfit: list[Place] = []
    for site in chosen:
        nodes = [call.node for call in site.calls]
        own = [makes[n] for n in nodes if n in makes] or [takes[n] for n in nodes if n in takes]
        if own:
            found.update({id(layer): layer for layer in own})
        else:
            unfit.append(Place(view.site_of(site.calls[0].node), (), _no_layer(site)))
    order = {site.key: index for index, site in enumerate(view.sites)}
    return sorted(
        [*_merged(view, [layer for layer in layers if id(layer) in found]), *unfit],
        key=lambda place: order[place.site.key],
    )


def _no_layer(site: Site) -> str:
    if site.kind == EXPERTS:
        return "stacked experts cannot be widened; target another layer, or use --side, which leaves them unchanged"
    return "it neither produces nor reads a hidden layer whose units stay apart; target the ops of an MLP"


# -- Checks and decisions


def check(place: Place, wider: str, view: View) -> str | None:
    """Return the reason why a hidden layer cannot be widened, or None.

    Args:
        place: hidden layers to widen.
        wider: new width, see `grown`.
        view: the program.
    """
    if place.why:
        return place.why
    layer = place.layers[0]
    if grown(wider, layer.width) <= layer.width:
        return f"--wider {wider} adds no unit to the {layer.width} that it has; ask for more"
    for call in (*layer.ups, layer.down):
        # The copy is made of the model's own tensors, so another tensor under the op would be lost.
        standing = tensors_now(view.site_of(call.node))
        if isinstance(standing, str):
            return f"{call.module_path}: {standing}"
        assert call.weight is not None
        if standing[0] not in view.names.get(str(call.weight.target), (str(call.weight.target),)):
            return f"{call.module_path} reads {standing[0]} instead of its weight; apply expand first"
    return None


def grown(wider: str, width: int) -> int:
    """Return the new width for `1.5` (times the old) or `+64` (more units)."""
    return width + int(wider[1:]) if wider.startswith("+") else round(width * float(wider))


def decide(place: Place, wider: str, view: View, probe: Measurements) -> dict[str, Any]:
    """Return the journal data of a place: widths, sources of the added units, and the tensors to widen.

    Args:
        place: hidden layers to widen.
        wider: new width, see `grown`.
        view: the program.
        probe: measurements of the program.
    """
    layer = place.layers[0]
    width = grown(wider, layer.width)
    sources = _draw(place, width, probe)
    tensors: dict[str, dict[str, Any]] = {}
    for node, axis, halves, outgoing in _widened(layer):
        val = node.meta["val"]
        shape = list(val.shape)
        shape[axis] = width * halves
        tensors[str(node.target)] = {
            "name": str(node.target),
            "shape": shape,
            "dtype": str(val.dtype).removeprefix("torch."),
            "axis": axis,
            "halves": halves,
            "outgoing": outgoing,
            "trains": str(node.target) in view.names,
        }
    return {"units": layer.width, "width": width, "sources": sources, "tensors": [*tensors.values()]}


def _widened(layer: Hidden) -> Iterator[tuple[fx.Node, int, int, bool]]:
    """Yield the tensors with an axis of units, as (node, axis, number of runs of units, True for outgoing weights)."""
    for call in layer.ups:
        halves = 2 if layer.is_fused(call) else 1
        assert call.weight is not None
        yield call.weight, call.layout.index("o"), halves, False
        if call.bias is not None:
            yield call.bias, 0, halves, False
    for node in layer.nodes:
        if op_name(node.target) == "batch_norm":
            held = (arguments(node)[name] for name in ("weight", "bias", "running_mean", "running_var"))
            yield from ((n, 0, 1, False) for n in held if isinstance(n, fx.Node))
    assert layer.down.weight is not None
    yield layer.down.weight, layer.down.layout.index("i"), 1, True


def _draw(place: Place, width: int, probe: Measurements) -> list[int]:
    """Draw the unit that each added unit repeats."""
    old = place.layers[0].width
    return probe.once(("expand", place.site.key, width), lambda: torch.randint(old, (width - old,)).tolist())


def _shares(site: Site, noise: float) -> Tensor:
    """Return each unit's share of its source's outgoing weights; the shares of one source add up to 1.

    Unequal shares (noise) break the symmetry between copies of a unit, which would otherwise train alike.
    """
    known = site.decided
    index = torch.tensor([*range(known["units"]), *known["sources"]])
    counts = torch.bincount(index, minlength=known["units"]).double()

    def draw() -> Tensor:
        uneven = 1 + noise * (2 * torch.rand(len(index), dtype=torch.float64) - 1)
        # A unit without a copy keeps its weights exactly.
        uneven = torch.where(counts[index] > 1, uneven, 1.0)
        return uneven / torch.zeros_like(counts).index_add_(0, index, uneven)[index]

    return site.probe.once(("expand shares", site.key, noise, tuple(known["sources"])), draw)


def tensors(site: Site, noise: float) -> dict[str, TensorSpec]:
    """Return the wider tensors of a site."""
    return {
        t["name"]: TensorSpec(
            tuple(t["shape"]),
            _filled(site, t, noise),
            trainable=t["trains"],
            dtype=getattr(torch, t["dtype"]),
        )
        for t in site.decided["tensors"]
    }


def _filled(site: Site, known: dict[str, Any], noise: float) -> Callable[[Tensor], Any]:
    def fill(tensor: Tensor) -> None:
        units = site.decided["units"]
        one = [*range(units), *site.decided["sources"]]
        # A fused weight holds gate and up one after the other, so both halves are widened with the same sources.
        index = torch.tensor([unit + half * units for half in range(known["halves"]) for unit in one])
        old = site.probe.tensor(known["name"])
        value = old.index_select(known["axis"], index.to(old.device)).cpu()
        if known["outgoing"]:
            along = [1] * value.dim()
            along[known["axis"]] = -1
            # Multiplied in fp64, so that only the final cast rounds.
            value = value.double() * _shares(site, noise).view(along)
        tensor.copy_(value)

    return fill


def tensor_names(site: Site, attribute: str) -> dict[str, str]:
    """Name the wider tensors: mlp.up.expand.weight widens mlp.up.weight."""
    found = {}
    for known in site.decided["tensors"]:
        owner, _, leaf = known["name"].rpartition(".")
        found[known["name"]] = f"{owner}.{attribute}.{leaf}" if owner else f"{attribute}.{leaf}"
    return found


# -- Graph


def rewrite(site: Site, g: Rewriter) -> None:
    """Replace the ops of a site's hidden layers by ops with the wider tensors."""
    named = {call.node.name for call in site.calls}
    layers = [layer for layer in find_hidden(g.view) if layer.down.node.name in named]
    for layer in layers:
        if layer.why or layer.width != site.decided["units"]:
            raise PassError(
                f"expand at {site.path}: its hidden layer is not the same in this graph "
                f"({layer.why or f'{layer.width} units'}); undo expand, and apply it again"
            )
        _widen(site, g, layer)


def _widen(site: Site, g: Rewriter, layer: Hidden) -> None:
    assert layer.axes is not None
    order = g.view.flow.order
    ups = {call.node: call for call in layer.ups}
    for node in sorted((*ups, *layer.nodes), key=lambda n: order[n]):
        if node in ups or op_name(node.target) == "batch_norm":
            _replace(site, g, node)
        else:
            source = node.args[0]
            axis = layer.axes.get(source, layer.axes[node])  # type: ignore[arg-type]
            g.resize(node, _arguments(site, node, axis))
    _replace(site, g, layer.down.node)


def _replace(site: Site, g: Rewriter, node: fx.Node) -> None:
    """Replace an op by a call with the wider tensors."""
    known = {tensor["name"] for tensor in site.decided["tensors"]}
    wide: dict[fx.Node, fx.Node] = {}

    def value(n: fx.Node) -> fx.Node:
        """Return an operand, or the same operand computed from the wider tensor."""
        if n not in wide:
            first = g.view.names.get(str(n.target), (str(n.target),)) if n.op == "get_attr" else ()
            own = next((name for name in first if name in known), None)
            if own is not None:
                wide[n] = g[own]
            elif _rests_on(n, known, g):
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), value)
                wide[n] = g.model_op(n.target, *args, **kwargs)
            else:
                wide[n] = n
        return wide[n]

    with g.after(node):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        fresh = g.model_op(node.target, *args, **kwargs)
    g.supersede(node, fresh)


def _rests_on(node: fx.Node, names: set[str], g: Rewriter) -> bool:
    """True if a value is computed from one of these tensors alone (transposed, cast)."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    aliases = g.view.names.get(str(node.target), (str(node.target),))
    return node.op == "get_attr" and not names.isdisjoint(aliases)


def _arguments(site: Site, node: fx.Node, axis: int) -> tuple[Any, ...]:
    """Return a node's arguments with the new number of units."""
    old, new = site.decided["units"], site.decided["width"]
    args: list[Any] = list(node.args)
    name = op_name(node.target)

    def resized(size: Any) -> Any:
        return {old: new, 2 * old: 2 * new}.get(size, size) if isinstance(size, int) else size

    if name in ("view", "reshape", "_unsafe_view"):
        args[1] = [*args[1][:-1], resized(args[1][-1])]
    elif name in ("split", "split_with_sizes"):
        args[1] = [resized(s) for s in args[1]] if isinstance(args[1], (list, tuple)) else resized(args[1])
    elif name == "slice" and arguments(node)["dim"] % node.args[0].meta["val"].dim() == axis:  # type: ignore[union-attr]
        args[2:4] = [resized(size) for size in args[2:4]]
    return tuple(args)
