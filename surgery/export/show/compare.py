"""The difference of two programs for display: what was added, removed and swapped, and how far values moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from surgery.common.errors import SurgeryError
from surgery.engine.diff import keyed_nodes
from surgery.engine.probe import InputSet, Probe
from surgery.engine.program import Program
from surgery.export.show.errors import read_tensor, relative_error
from surgery.export.show.model import ModelData, Op, Weight, model_data, path_of
from surgery.export.show.values import moved_values
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import mark_of, output_with_adapters
from surgery.graph.sites import Site


@dataclass
class _Pairing:
    """Pairs of nodes of two programs.

    Attributes:
        old_of: Name of a running node of B -> the running node of A that is its pair.
        swapped: Name of a running node of B -> the running node of A whose place it has taken.
        removed: Running nodes of A without a running pair -> id of the entry that removed it, or "".
        values: (name in A, name in B) of values that stand for each other.
    """

    old_of: dict[str, fx.Node]
    swapped: dict[str, fx.Node]
    removed: dict[fx.Node, str]
    values: list[tuple[str, str]]


def compare(
    a: Program, b: Program, titles: tuple[str, str], *, values: bool = True, data: Sequence[InputSet] = ()
) -> ModelData:
    """Program `b` for display, with its difference from `a`. Removed ops and weights are included.

    Args:
        a: First program.
        b: Second program.
        titles: Titles of both.
        values: Run both programs and compare the values of their ops.
        data: Inputs to run them on, a sequence of (args, kwargs); by default the example inputs of `a`.
    """
    old, new = model_data(a, titles[0], errors=False), model_data(b, titles[1], errors=False)
    pairing = _pair(a, b)
    moved: Mapping[str, float] = {}
    notes: list[tuple[str, str]] = []
    if values:
        moved, note = _moved(a, b, pairing, data)
        notes.append(("values", note))
    ops = _merged(old, new, pairing, moved)
    weights = _weights(a, b, old, new)
    only = [
        (f"only in {title}", fact[0] + ": " + fact[1])
        for title, one, other in ((titles[0], old, new), (titles[1], new, old))
        for fact in one.facts
        if fact not in other.facts
    ]
    sizes = f"{sum(old.parameters.values()):,} → {sum(new.parameters.values()):,}"
    return replace(
        new,
        title=f"{titles[0]} → {titles[1]}",
        classes={**old.classes, **new.classes},
        ops=tuple(ops),
        weights=weights,
        facts=(("parameters", sizes), *notes, *only),
        kind="diff",
    )


def _pair(a: Program, b: Program) -> _Pairing:
    left, right = keyed_nodes(a.graph), keyed_nodes(b.graph)
    live_a, live_b = live_nodes(a.graph), live_nodes(b.graph)
    by_name = {node.name: node for node in b.graph.nodes}
    found = _Pairing({}, {}, {}, [])
    for key, old in left.items():
        new = right.get(key)
        if old not in live_a or old.op == "get_attr":
            continue
        if new is not None and new in live_b:
            found.old_of[new.name] = old
            found.values.append((old.name, new.name))
            ends = output_with_adapters(old, whole=True), output_with_adapters(new, whole=True)
            if ends != (old, new) and ends[0] in live_a and ends[1] in live_b:
                found.values.append((ends[0].name, ends[1].name))
            continue
        fresh = _successor(new, by_name) if new is not None else None
        by = mark_of(fresh).entry if fresh is not None else mark_of(old).entry
        if fresh is None or fresh not in live_b:
            found.removed[old] = by
            continue
        # Of several ops that one op has replaced (conv and norm), the last has computed its value.
        earlier = found.swapped.get(fresh.name)
        if earlier is not None:
            found.removed[earlier] = by
        found.swapped[fresh.name] = old
    found.values += [(old.name, name) for name, old in found.swapped.items()]
    return found


def _successor(node: fx.Node, by_name: Mapping[str, fx.Node]) -> fx.Node | None:
    """The node that replaced this one for good, or a value that replaces it without reading it; or None."""
    seen = set()
    while node.name not in seen:
        seen.add(node.name)
        mark = mark_of(node)
        following = by_name.get(mark.gone_for or mark.wrapped_by or "")
        if following is None:
            break
        node = following
    return node if len(seen) > 1 else None


def _moved(
    a: Program, b: Program, pairing: _Pairing, data: Sequence[InputSet]
) -> tuple[Mapping[str, float], str]:
    """Differences by node of B, and a sentence about how they were computed."""
    if not (a.base.in_memory and b.base.in_memory):
        return {}, "not compared: the weights are not in memory"
    paths = {node.name: path_of(node) for node in a.graph.nodes}
    # The last value of each module.
    first = {path: old for old, _ in pairing.values if (path := paths[old]) is not None}
    try:
        found, whole = moved_values(a, b, pairing.values, set(first.values()), data)
    except SurgeryError as error:
        return {}, f"not compared: {error}"
    inputs = f"{len(data)} given inputs" if data else "the example inputs"
    part = "" if whole else "; only the outputs of modules, because all values do not fit into memory"
    return found, f"compared on {inputs}: max|a − b| / max|a|{part}"


def _merged(old: ModelData, new: ModelData, pairing: _Pairing, moved: Mapping[str, float]) -> Iterator[Op]:
    """Ops of B with their changes, and the removed ones of A after the op that they followed there."""
    old_ops = {op.id: op for op in old.ops}
    new_of = {node.name: name for name, node in (*pairing.old_of.items(), *pairing.swapped.items())}
    gone = {node.name: entry for node, entry in pairing.removed.items() if node.name in old_ops}
    following: dict[str, list[Op]] = {}
    last = ""
    for op in old.ops:
        if op.id in new_of:
            last = new_of[op.id]
        elif op.id in gone:
            inputs = tuple(_here(each, new_of, gone) for each in op.inputs)
            removed = replace(
                op, id=f"old {op.id}", change="-", by=gone[op.id], inputs=tuple(filter(None, inputs))
            )
            following.setdefault(last, []).append(removed)
    yield from following.get("", [])
    for op in new.ops:
        if op.id in pairing.swapped:
            before = old_ops[pairing.swapped[op.id].name]
            op = replace(op, change="s", was=f"{before.op} {before.shape}")
        elif op.id not in pairing.old_of:
            before = None
            op = replace(op, change="+")
        else:
            before = old_ops.get(pairing.old_of[op.id].name)
            if before is not None:
                op = _rewired(op, before, new_of)
        if before is not None:
            op = replace(op, lost=tuple(f"old {each}" for each in before.inputs if each in gone))
        yield replace(op, moved=moved.get(op.id))
        yield from following.get(op.id, [])


def _here(name: str, new_of: Mapping[str, str], gone: Mapping[str, str]) -> str:
    """Id of an op of A in the display; "" if it is not shown."""
    return new_of.get(name) or (f"old {name}" if name in gone else "")


def _rewired(op: Op, before: Op, new_of: Mapping[str, str]) -> Op:
    """The op, marked as changed if it reads other values or has another shape or dtype than before."""
    if (op.shape, op.dtype) != (before.shape, before.dtype):
        return replace(op, change="~", was=f"{before.shape} {before.dtype}".strip())
    if tuple(new_of.get(each, each) for each in before.inputs) != op.inputs or before.weights != op.weights:
        return replace(op, change="~", was="reading " + ", ".join((*before.inputs, *before.weights)))
    return op


def _weights(a: Program, b: Program, old: ModelData, new: ModelData) -> dict[str, Weight]:
    """Weights of B with their changes, and the removed ones of A."""
    in_memory = a.base.in_memory and b.base.in_memory
    before, after = (a.state(), b.state()) if in_memory else ({}, {})
    found: dict[str, Weight] = {}
    for name, weight in new.weights.items():
        earlier = old.weights.get(name)
        if earlier is None:
            weight = replace(weight, change="+")
        elif (earlier.shape, earlier.dtype) != (weight.shape, weight.dtype):
            weight = replace(weight, change="~", was=f"{earlier.shape} {earlier.dtype}")
        elif name in before and name in after and not torch.equal(before[name], after[name]):
            weight = replace(weight, change="~", error=relative_error(before[name], after[name]))
        found[name] = weight
    found.update((n, replace(w, change="-")) for n, w in old.weights.items() if n not in new.weights)
    if in_memory:
        for name, error in _computed(a, b, old, new).items():
            if name in found:
                found[name] = replace(found[name], error=error)
    return found


def _computed(a: Program, b: Program, old: ModelData, new: ModelData) -> dict[str, float]:
    """Errors of the weights that are computed from other tensors in one of the programs, by the tensor in B."""
    found: dict[str, float] = {}
    places = {site.key: site for site in a.sites}
    probes = Probe(a), Probe(b)
    for site in b.sites:
        twin = places.get(site.key)
        if twin is None or not site.weight or not twin.weight:
            continue
        tensors = _held(twin), _held(site)
        if tensors[0] == tensors[1] or tensors[0] not in old.weights or tensors[1] not in new.weights:
            continue
        error = relative_error(probes[0].stored(twin), probes[1].stored(site))
        if error is not None:
            found[tensors[1]] = error
    return found


def _held(site: Site) -> str:
    return str(site.weight) if site.packed else read_tensor(site)
