"""Turns the deltas of a program into LoRAs of a rank: the nearest ones, with their error."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine.contract.base import Pass
from surgery.engine.contract.observe import observe
from surgery.engine.journal import Journal
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.graph.ops import CONV, EXPERTS, NORM
from surgery.graph.sites import Site
from surgery.passes.algebra import factor
from surgery.passes.delta import Delta
from surgery.passes.lora.lora import Lora
from surgery.passes.select.full import Full
from surgery.store.peft.whole import current_values


def nearest_lora(program: Program, rank: int) -> Program:
    """The program with a LoRA instead of each delta: the nearest one of a rank (Eckart and Young 1936).

    Biases and norms, which have no factors, become trained values of the base. The journal says how far the updates and
    the outputs on the example inputs are from those of the deltas (`numerics` of the new entries).

    Args:
        program: The program.
        rank: Largest rank; a small weight gets the rank that it has.

    Raises:
        PassError: The program has no delta, the rank is no rank, or a delta cannot become a LoRA.
    """
    deltas = [entry for entry in live_entries(program.journal) if entry.pass_name == Delta.name]
    if not deltas:
        raise PassError("--as-lora is for deltas, and the program has none; leave it out")
    if rank < 1:
        raise PassError(f"--as-lora {rank}: give a rank of 1 or more")
    values, base = current_values(program), program.base
    plain = program
    for entry in deltas:
        plain = plain.undo(entry.id)
    found: dict[int, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)
    rest: dict[str, Tensor] = {}
    worst = (0.0, "")
    for record in (record for entry in deltas for record in entry.sites):
        site = base.sites.by_key[record.key]
        for slot, name in (("weight", site.weight), ("bias", site.bias)):
            if name is None or slot not in record.decided["shapes"]:
                continue
            if slot == "bias" or site.kind == NORM or (site.kind == CONV and site.layout == "io"):
                rest[name] = values[name]
                continue
            a, b, width, error = _nearest(site, values[name] - base.tensors[name].detach(), rank)
            found[width][record.path] = a, b
            worst = max(worst, (error, record.path))
    tied = next((name for name in rest if len(base.names.get(name, ())) > 1), None)
    if tied is not None:
        raise PassError(f"--as-lora: {tied} is tied, and has no factors; leave --as-lora out")
    label = deltas[0].label or "delta"
    passes: list[Pass] = [
        Lora(
            target=",".join(f"path:{path}" for path in own),
            rank=width,
            alpha=float(width),
            **{"as": label if len(found) == 1 else f"{label}_{number}"},
        )
        for number, (width, own) in enumerate(found.items(), 1)
    ]
    names = [name for name in rest if isinstance(base.tensors[name], nn.Parameter)]
    if names:
        passes.append(Full(target=",".join(f"path:{name}" for name in names)))
    made = plain.apply(*passes, freeze_base=not any(e.kind == "select" for e in plain.journal))
    made.own()
    factors = {path: pair for own in found.values() for path, pair in own.items()}
    with torch.no_grad():
        for entry in made.journal.entries[len(plain.journal) :]:
            for record in entry.sites:
                for name, value in zip("AB", factors[record.path], strict=True):
                    made.tensors[record.tensors[name]].copy_(value)
        for name, value in rest.items():
            made.changed[base.names.get(name, (name,))[0]].copy_(value)
    moved = observe(program.run(), made.run())
    said = (
        f"the nearest LoRA of rank {rank}: its updates differ by up to {worst[0]:.1%} of their norm"
        f"{f' ({worst[1]})' if worst[1] else ''}, and the outputs by {moved.difference:.1e} of their scale"
    )
    own = {entry.id for entry in made.journal.entries[len(plain.journal) :] if entry.pass_name == Lora.name}
    made.journal = Journal(
        tuple(
            replace(e, numerics={"declared": "factored from a delta", "observed": said}) if e.id in own else e
            for e in made.journal
        )
    )
    return made


def _nearest(site: Site, change: Tensor, rank: int) -> tuple[Tensor, Tensor, int, float]:
    """A and B of a LoRA of scale 1 in the shapes of the pass, their rank, and the relative error of B A."""
    matrices = factor.matrices(site, change)
    directions = factor.directions(matrices, None, False)
    width = min(rank, directions.basis.shape[2])
    a, b = factor.factors(matrices, directions, width)
    if site.kind == CONV:
        a, b = factor.as_stored(site, a, b)
    elif site.kind != EXPERTS:
        a, b = a[0], b[0]
    return a.to(change.dtype), b.to(change.dtype), width, directions.error(width)
