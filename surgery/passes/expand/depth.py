"""Deeper: inserts copies of whole blocks, each of which is the identity at first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.marks import output_with_adapters, set_mark
from surgery.graph.ops import CONV, NORM, Call
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site, SiteKey
from surgery.graph.targets import select_sites
from surgery.passes.expand.region import Region, adapters_in, module_of, outer_values, region_of, run

if TYPE_CHECKING:
    from surgery.graph.analysis.blocks import Block, Branch
    from surgery.graph.sites import Measurements
    from surgery.graph.view import View

aten = torch.ops.aten

GATE = "residual_gate"
MOST_COPIES = 1000


@dataclass(frozen=True)
class Request:
    """Options of a deeper program.

    Attributes:
        deeper: number of copies.
        after: indices of the blocks to copy, in their row.
        row: index of the row of blocks.
        target: weights that the copied blocks must contain.
    """

    deeper: int | None
    after: tuple[int, ...] | None
    row: int | None
    target: str | None


@dataclass(frozen=True)
class Place:
    """Blocks that are identified by one site (several, if layers share their weights), and the copies of each."""

    site: Site
    blocks: tuple[Block, ...]
    copies: tuple[int, ...]


# -- Selection of blocks


def places(request: Request, view: View) -> list[Place]:
    """Return the blocks to copy, in graph order.

    Raises:
        PassError: if the model has no such blocks.
        TargetError: if a term of the target matches no site.
    """
    rows = view.blocks
    if not rows:
        raise PassError(
            "pass 'expand': the model has no repeated blocks to copy (no residual branches were found); use --wider "
            "or --side"
        )
    chosen = _spread(request, _blocks(request, rows, view))
    keys: dict[SiteKey, Site] = {}
    for block in chosen:
        site = _site_of(block, view)
        keys[site.key] = site
    found = []
    for site in keys.values():
        blocks = blocks_with(site, view)
        found.append(Place(site, tuple(blocks), tuple(chosen.get(block, 0) for block in blocks)))
    return found


def outside(target: str | None, view: View) -> list[Site]:
    """Return the sites that a target selects and that lie in no block."""
    if target is None:
        return []
    inside = {call.node for row in view.blocks for block in row for call in block.calls}
    return [s for s in select_sites(view.sites.sites, target) if inside.isdisjoint(c.node for c in s.calls)]


def _blocks(request: Request, rows: Sequence[Sequence[Block]], view: View) -> list[Block]:
    if request.row is not None:
        if request.row >= len(rows):
            lengths = ", ".join(str(len(row)) for row in rows)
            raise PassError(
                f"pass 'expand': --row {request.row}: the model has {len(rows)} rows of blocks, numbered from 0, "
                f"of length {lengths}"
            )
        rows = [rows[request.row]]
    if request.target is not None:
        named = {call.node for site in select_sites(view.sites.sites, request.target) for call in site.calls}
        blocks = [b for row in rows for b in row if any(call.node in named for call in b.calls)]
    else:
        # Of rows of equal length the last is taken: in an encoder-decoder that is the decoder.
        longest = max(len(row) for row in rows)
        blocks = list([row for row in rows if len(row) == longest][-1])
    if request.after is None:
        return blocks
    for number in request.after:
        if not any(block.index == number for block in blocks):
            numbers = ", ".join(str(block.index) for block in blocks) or "none"
            raise PassError(f"pass 'expand': --after {number}: no such block; the blocks are {numbers}")
    return [block for block in blocks if block.index in request.after]


def _spread(request: Request, blocks: Sequence[Block]) -> dict[Block, int]:
    """Return the number of copies of each block.

    The blocks are divided evenly into as many parts as copies are wanted, and the last block of each part is copied.
    """
    if request.after is None:
        # Blocks that change the shape cannot follow themselves; if there are no others, `check` refuses them.
        blocks = [block for block in blocks if block.repeatable] or blocks
    wanted = request.deeper or len(blocks)
    found: dict[Block, int] = {}
    for part in range(wanted if blocks else 0):
        block = blocks[-(-(part + 1) * len(blocks) // wanted) - 1]
        found[block] = found.get(block, 0) + 1
    return found


def _site_of(block: Block, view: View) -> Site:
    """Return a site that no other block contains; if layers share all their weights, the first site of the block."""
    sites = [view.site_of(call.node) for call in block.calls]
    inside = {call.node for call in block.calls}
    own = (site for site in sites if all(call.node in inside for call in site.calls))
    return next(own, sites[0])


def blocks_with(site: Site, view: View) -> list[Block]:
    """Return every block that contains a call of the site, in graph order."""
    named = {call.node.name for call in site.calls}
    return [b for row in view.blocks for b in row if any(call.node.name in named for call in b.calls)]


# -- Checks and decisions


def check(place: Place, view: View) -> str | None:
    """Return the reason why the blocks of a place cannot be copied, or None."""
    regions = [region_of(block, view) for block in place.blocks]
    for block, region, copies in zip(place.blocks, regions, place.copies, strict=True):
        if not copies:
            continue
        if not block.repeatable:
            return (
                f"block {block.index} of row {block.group} cannot follow itself: it changes the shape of the stream, "
                f"or has a projection in its shortcut; choose others with --after"
            )
        adapters = adapters_in(region)
        if adapters:
            return f"it carries {adapters[0]!r}, which a copy would lose; apply expand first, or undo {adapters[0]!r}"
        if region.own != regions[0].own:
            return "blocks that share this weight differ in their other weights; copy others with --after"
        if not region.own:
            return "it has no weights of its own to train"
    return None


def decide(place: Place, view: View, probe: Measurements) -> dict[str, Any]:
    """Return the journal data of a place.

    Args:
        place: blocks to copy.
        view: the program.
        probe: measurements of the program.
    """
    block, region = next(
        (block, region_of(block, view)) for block, n in zip(place.blocks, place.copies, strict=True) if n
    )
    # A copy is the identity if its output projections are zero. That is verified on data, because a bias or a
    # post-norm may add more. Otherwise a gate that starts at zero makes it the identity.
    held = {name: probe.tensor(name) for name in region.own}
    zero = _output_projections(region, block, view)
    zero = [name for name in zero if name in held and held[name].is_floating_point()]
    x = _outer(place, view, probe)[region.output]
    exact = bool(zero) and torch.equal(run(probe, region, _outer(place, view, probe), zero, view), x)
    name = GATE
    # A copy of a copy also copies the first one's gate, so the name must be free.
    while any(own.endswith(f".{name}") for own in region.own):
        name += "_"
    return {
        "block": module_of(region.own),
        "copies": list(place.copies),
        "tensors": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "trains": name in view.names and tensor.is_floating_point(),
            }
            for name, tensor in held.items()
        ],
        "zero": zero if exact else [],
        "gate": None if exact else {"name": name, "shape": _gate_shape(region, block, view)},
        "dtype": str(region.output.meta["val"].dtype).removeprefix("torch."),
    }


def _outer(place: Place, view: View, probe: Measurements) -> dict[fx.Node, Any]:
    """Return the values that the region reads from outside, on the first set of data."""

    def measure() -> dict[fx.Node, Any]:
        nodes = {n for block in place.blocks for n in outer_values(region_of(block, view))}
        values = probe.values(nodes)
        return {node: values[node.name][0] for node in nodes}

    return probe.once(("expand", place.site.key), measure)


def _output_projections(region: Region, block: Block, view: View) -> list[str]:
    """Return the names of the tensors that end each branch: those of the norm after the last projection, if any."""
    by_node = {call.node: call for call in region.calls}
    found: dict[str, None] = {}
    for branch in block.branches:
        for call in _norms_after(branch, by_node, view) or [by_node[branch.last]]:
            for n in (call.weight, call.bias):
                if n is not None:
                    found[view.names.get(str(n.target), (str(n.target),))[0]] = None
    return list(found)


def _norms_after(branch: Branch, calls: Mapping[fx.Node, Call], view: View) -> list[Call]:
    order = view.flow.order
    after = [calls[n] for n in branch.ops if n in calls and order[n] > order[branch.last]]
    return [call for call in after if call.kind == NORM and call.weight is not None]


def _gate_shape(region: Region, block: Block, view: View) -> list[int]:
    """Return a shape that broadcasts over the stream's features, or that of a scalar if they cannot be determined."""
    shape = region.output.meta["val"].shape
    last = view.site_of(block.branches[-1].last) if block.branches else None
    width = last.out_features if last is not None else None
    fits = [axis for axis in (-1, 1) if isinstance(shape[axis], int) and shape[axis] == width]
    if not fits:
        return []
    axis = 1 if last is not None and last.kind == CONV and 1 in fits else fits[0]
    return [int(shape[axis]), *(1 for _ in shape[2:])] if axis == 1 else [int(shape[-1])]


# -- Tensors and graph


def tensors(site: Site) -> dict[str, TensorSpec]:
    """Return the tensors of all copies at a site."""
    known, specs = site.decided, {}
    copies = sum(known["copies"])
    if min(known["copies"]) < 0 or copies > MOST_COPIES:
        raise PassError(
            f"expand at {site.path}: {copies} copies of a block; up to {MOST_COPIES} are supported"
        )
    for number in range(1, copies + 1):
        for tensor in known["tensors"]:
            key, dtype = _key(known, number, tensor["name"]), getattr(torch, tensor["dtype"])
            specs[key] = TensorSpec(
                tuple(tensor["shape"]), _filled(site, tensor["name"]), trainable=tensor["trains"], dtype=dtype
            )
        if known["gate"] is not None:
            shape, dtype = tuple(known["gate"]["shape"]), getattr(torch, known["dtype"])
            specs[f"{number}.{known['gate']['name']}"] = TensorSpec(shape, dtype=dtype)
    return specs


def _key(known: Mapping[str, Any], number: int, name: str) -> str:
    """Return the tensor's name in the pass: number of the copy, and name within the block."""
    rest = name.removeprefix(f"{known['block']}.") if known["block"] else name
    return f"{number}.{rest}"


def _filled(site: Site, name: str) -> Callable[[Tensor], Any]:
    if name in site.decided["zero"]:
        return torch.nn.init.zeros_
    return lambda tensor: tensor.copy_(site.probe.tensor(name))


def tensor_names(site: Site, attribute: str) -> dict[str, str]:
    """Name the copies under the block: layers.3.expand_1.mlp.up.weight copies layers.3.mlp.up.weight."""
    block = site.decided["block"]
    stem = f"{block}.{attribute}_" if block else f"{attribute}_"
    return {key: f"{stem}{key}" for key in tensors(site)}


def rewrite(site: Site, g: Rewriter, attribute: str) -> None:
    """Insert the copies of a site's blocks.

    Args:
        site: site with the journal data.
        g: rewriter of the graph.
        attribute: attribute name of the pass, used in module paths.
    """
    known, view, number = site.decided, g.view, 0
    blocks = blocks_with(site, view)
    if len(blocks) != len(known["copies"]):
        raise PassError(
            f"expand at {site.path}: the pass recorded {len(known['copies'])} blocks there, but this graph has "
            f"{len(blocks)}; undo expand, and apply it again"
        )
    for block, copies in zip(blocks, known["copies"], strict=True):
        if copies:
            region = region_of(block, view)
            numbers = range(number + 1, number + copies + 1)
            g.insert_after(
                output_with_adapters(region.output), partial(_chain, site, g, region, numbers, attribute)
            )
            number += copies


def _chain(
    site: Site, g: Rewriter, region: Region, numbers: Sequence[int], attribute: str, x: fx.Node
) -> fx.Node:
    for number in numbers:
        x = _copy(site, g, region, x, number, f"{attribute}_{number}")
    return x


def _copy(site: Site, g: Rewriter, region: Region, x: fx.Node, number: int, name: str) -> fx.Node:
    known, names = site.decided, g.view.names
    own = {tensor["name"] for tensor in known["tensors"]}
    mapping: dict[fx.Node, fx.Node] = dict.fromkeys(region.inputs, x)
    for node in region.nodes:
        for operand in node.all_input_nodes:
            first = names.get(str(operand.target), (str(operand.target),))[0]
            if operand.op == "get_attr" and first in own:
                mapping[operand] = g[_key(known, number, first)]
    for node in region.nodes:
        mapping[node] = g.copy(node, mapping)
        _move(mapping[node], known["block"], name)
    end = mapping[region.output]
    # With a weight other than 1, the copy is interpolated with the identity: y = x + w·(copy(x) − x).
    if known["gate"] is None and g.weight == 1:
        return end
    block = known["block"]
    if known["gate"] is None:
        return _gate(_move(g.model_op(aten.lerp.Scalar, x, end, g.weight), block, name), 1)
    change = _gate(_move(g.model_op(aten.sub.Tensor, end, x), block, name), 0)
    gate = g[f"{number}.{known['gate']['name']}"]
    return _gate(_move(g.model_op(aten.addcmul.default, x, change, gate, value=g.weight), block, name), 1)


def _gate(node: fx.Node, passes: int) -> fx.Node:
    """Mark a gate, so that analyses look through it to the argument with index `passes`."""
    set_mark(node, gate=passes)
    return node


def _move(node: fx.Node, block: str, name: str) -> fx.Node:
    """Assign a node to the module of the copy inside the block's module."""
    path, stack = f"{block}.{name}" if block else name, {}
    inner = {}
    kind = "torch.nn.modules.module.Module"
    for key, (where, what) in node.meta.get("nn_module_stack", {}).items():
        if where == block:
            kind = what
        if where == "" or where == block or block.startswith(where + "."):
            stack[key] = where, what
        elif not block or where.startswith(block + "."):
            rest = where.removeprefix(block + ".") if block else where
            # torch.export numbers repeated calls of a module as `name@1`, so the number is kept at the end.
            base, at, call = key.partition("@")
            inner[f"{base}.{name}{at}{call}"] = f"{path}.{rest}", what
    stack[f"{path}.{name}"] = path, kind
    node.meta["nn_module_stack"] = {**stack, **inner}
    return node
