"""Reads IA³ checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from surgery.common.patterns import matcher
from surgery.engine.contract.base import Pass
from surgery.engine.program import Program
from surgery.engine.registry import find_pass
from surgery.graph.ops import CONV
from surgery.store.peft.checkpoint import (
    apply_passes,
    check_paths,
    check_sizes,
    fresh,
    plan_of,
    put,
)
from surgery.store.peft.checkpoint_data import Checkpoint


def read_ia3(given: Checkpoint, base: Program) -> Program:
    """Apply an IA³ checkpoint: one pass for scaled inputs, one for scaled outputs."""
    scales = {n.removesuffix(".ia3_l"): t for n, t in given.tensors.items() if n.endswith(".ia3_l")}
    rest = {n.replace(".base_layer.", "."): t for n, t in given.tensors.items() if not n.endswith(".ia3_l")}
    check_paths(given, base, scales)
    cls = find_pass(base.base.plugins, "ia3", "torch-surgery-ia3").cls
    sides = _sides(given, base, scales)
    wanted = {side: paths for side, paths in sides.items() if paths}
    passes: list[Pass] = [
        cls.parse(
            {
                "target": ",".join(f"path:{p}" for p in paths),
                "scale": side,
                "as": side if not given.label else f"{given.label}_{side}",
            }
        )
        for side, paths in wanted.items()
    ]
    for pass_ in passes:
        planned = plan_of(given, base, pass_)
        values = {s.site.path: dict.fromkeys(s.specs, scales[s.site.path]) for s in planned.accepted}
        check_sizes(given, planned, values)
    program = apply_passes(given, base, passes, rest)
    for entry in fresh(program, base, "ia3"):
        for record in entry.sites:
            (name,) = record.tensors.values()
            put(given, program.tensors[name], scales[record.path], record.path)
    return program


def _sides(given: Checkpoint, base: Program, scales: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Paths whose inputs are scaled, and those whose outputs are.

    The vector of a linear layer has the shape (1, in) or (out, 1). Those of a convolution have one shape for both, and
    the configuration tells which it is.
    """
    listed = given.config.get("feedforward_modules") or ()
    wanted = tuple(
        name for name in ([listed] if isinstance(listed, str) else listed) if isinstance(name, str)
    )
    kinds = {site.path: site.kind for site in base.sites}
    found: dict[str, list[str]] = {"input": [], "output": []}
    for path, scale in scales.items():
        if kinds[path] == CONV or scale.numel() == 1:
            # As PEFT matches: a text is a pattern of whole paths, and a list has ends of paths.
            is_input = (
                bool(matcher(listed).fullmatch(path)) if isinstance(listed, str) else path.endswith(wanted)
            )
        else:
            is_input = scale.shape[0] == 1
        found["input" if is_input else "output"].append(path)
    return found
