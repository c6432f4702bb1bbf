"""Compares the values of two programs, node by node, on the same inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from surgery.engine.probe import InputSet, Probe
from surgery.engine.program import Program

# Values of one program that are held at a time. Beyond this, only those that leave a module are compared.
MOST_BYTES = 2 << 30


def moved_values(
    a: Program,
    b: Program,
    pairs: Sequence[tuple[str, str]],
    first: Collection[str],
    data: Sequence[InputSet] = (),
) -> tuple[dict[str, float], bool]:
    """Difference of the values of paired nodes; see `distance`.

    The values of `a` are held while `b` runs, and those of `b` are compared as they are computed.

    Args:
        a: First program.
        b: Second program.
        pairs: (name of a node of `a`, name of a node of `b`).
        first: Names of nodes of `a` that are compared even if there is no room for all values.
        data: Inputs, a sequence of (args, kwargs); by default the example inputs of `a`.

    Returns:
        Name of a node of `b` -> largest difference over the inputs; and True if all pairs fitted into memory.

    Raises:
        PassError: The inputs do not fit one of the programs.
    """
    partner = {new: old for old, new in pairs}
    found: dict[str, float] = {}
    whole = True
    for inputs in data or [a.example_inputs]:
        held = _Held(set(partner.values()), first, _writes_in_place(a))
        # Dropout and noise of a graph have to draw the same numbers in both.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Probe(a, [inputs]).watch(held.names, held.keep)

        def compare(name: str, value: Any, held: Mapping[str, Tensor] = held.values) -> None:
            before = held.get(partner[name])
            if before is not None and isinstance(value, Tensor):
                away = distance(before, value)
                if away is not None:
                    found[name] = max(away, found.get(name, 0.0))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Probe(b, [inputs]).watch(set(partner), compare)
        whole = whole and not held.full
    return found, whole


def distance(a: Tensor, b: Tensor) -> float | None:
    """max|a − b| / max|a| of floating-point values; of others the share of elements that differ. None: other shapes."""
    if a.shape != b.shape:
        return None
    if not a.numel():
        return 0.0
    if not (a.is_floating_point() and b.is_floating_point()):
        return float((a != b).float().mean())
    before, after = a.detach().double(), b.detach().double()
    finite = before.isfinite() & after.isfinite()
    # An attention mask has −inf: equal values that are not finite have not moved, others have moved by all.
    if not bool((finite | (before == after) | (before.isnan() & after.isnan())).all()):
        return 1.0
    zero = before.new_zeros(())
    largest = float(torch.where(finite, before, zero).abs().max())
    away = float(torch.where(finite, after - before, zero).abs().max())
    return away / largest if largest else float(away > 0)


class _Held:
    """Values of one run, as long as they fit."""

    def __init__(self, names: set[str], first: Collection[str], copies: bool) -> None:
        self.names, self.first, self.copies = names, first, copies
        self.values: dict[str, Tensor] = {}
        self.full = False
        self._bytes = 0

    def keep(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor) or (self.full and name not in self.first):
            return
        self._bytes += value.numel() * value.element_size()
        if self._bytes > MOST_BYTES and not self.full:
            self.full = True
            self.values = {n: v for n, v in self.values.items() if n in self.first}
        if not self.full or name in self.first:
            # An op that writes in place would change a value after it was seen.
            self.values[name] = value.detach().clone() if self.copies else value.detach()


def _writes_in_place(program: Program) -> bool:
    def mutable(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return schema is not None and schema.is_mutable

    return any(mutable(node) for node in program.graph.nodes)
