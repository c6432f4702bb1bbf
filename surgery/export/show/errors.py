"""Errors of weights that a pass replaced, such as quantized ones, relative to the weights of the base."""

from __future__ import annotations

import torch

from surgery.engine.probe import Probe
from surgery.engine.program import Program
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import mark_of
from surgery.graph.rewrite.current import weight_reader
from surgery.graph.sites import Site


def weight_errors(program: Program) -> dict[str, float]:
    """‖W' − W‖ / ‖W‖ of every weight that an op reads in another form W' than the base's W.

    W' is the weight as the op computes with it: dequantized, masked, scaled. Nothing is compared where weights are not
    in memory, or a pass has changed the shape.

    Returns:
        Name of the weight, or of the first tensor that its op now computes it from -> error.
    """
    found: dict[str, float] = {}
    if not program.base.in_memory:
        return found
    probe = Probe(program)
    replaced = {mark_of(node).weight_of for node in live_nodes(program.graph)} - {None}
    for site in program.sites:
        if site.weight not in replaced or site.packed or site.weight in program.base.released:
            continue
        original = program.base.tensors.get(str(site.weight))
        if original is None:
            continue
        error = relative_error(original, probe.stored(site))
        if error is not None:
            found[read_tensor(site)] = error
    return found


def read_tensor(site: Site) -> str:
    """Name of the tensor that holds a site's weight now: its own weight, the codes of a quantized one, its copy."""
    current = weight_reader(site.calls[0])[1]
    held = [current, *current.all_input_nodes]
    return next((str(n.target) for n in held if n.op == "get_attr"), str(site.weight))


def relative_error(old: torch.Tensor, new: torch.Tensor) -> float | None:
    """‖new − old‖ / ‖old‖ in float32; None if the shapes differ or `old` is zero."""
    if old.shape != new.shape or not old.numel():
        return None
    with torch.no_grad():
        before, after = old.detach().float(), new.detach().float()
        norm = float(before.norm())
        return float((after - before).norm()) / norm if norm else None
