"""Merging LoRA of rank 8 into the weights of all linear layers of SmolLM2 (MiniLM with --quick).

The floor is the bare `weight.addmm_(B, A, alpha=scale)` over the same tensors. PEFT's merge is merge_and_unload. An
in-place merge consumes the base, so the weights are restored before every run, outside the timed part. The output check
(two runs of the model) is not timed (`verify=False`), since no peer has one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import surgery
from benchmarks.models import Model, minilm, randomise, smollm2
from benchmarks.timing import Row, Variant, compare, measure

AIM = 1.5
RANK, ALPHA = 8, 16.0


def run(quick: bool) -> Iterator[Row]:
    model = minilm() if quick else smollm2()
    program = model.program().apply(surgery.Lora(target="all-linear", rank=RANK, alpha=ALPHA), verify=False)
    randomise(program)
    factors = _factors(program)
    weights = {name: program.base.tensors[name] for name in factors}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}

    def restore() -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
        program.base.consumed = False

    def floor(_: None) -> None:
        with torch.no_grad():
            for name, (a, b) in factors.items():
                weights[name].addmm_(b, a, alpha=ALPHA / RANK)

    peft = _peft(model, program)
    variants = {
        "in place": Variant(lambda _: program.merge(in_place=True), restore),
        "floor": Variant(floor, restore),
        "copy": Variant(lambda _: program.merge(verify=False).folded(), restore),
        "PEFT": Variant(lambda module: module.merge_and_unload(), lambda: copy.deepcopy(peft)),
    }
    times = measure(variants, rounds=3 if quick else 9)
    _check(program, factors, weights, restore, floor)
    size = sum(weight.numel() for weight in weights.values()) / 1e6
    what, note = f"{model.name}: merge", f"{len(weights)} weights, {size:.0f}M parameters"
    yield compare("merge", f"{what} in place", times, "in place", "floor", AIM, note)
    yield compare("merge", f"{what} in place", times, "in place", "PEFT")
    yield compare(
        "merge", f"{what}, base kept", times, "copy", "floor", note="the merged weights are new tensors"
    )
    yield compare("merge", f"{what}, base kept", times, "copy", "PEFT")


def _factors(program: surgery.Program) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors: weight name -> (A, B)."""
    entry = program.journal.find("lora")[0]
    tensors = program.tensors
    return {r.key.owner: (tensors[r.tensors["A"]], tensors[r.tensors["B"]]) for r in entry.sites}


def _peft(model: Model, program: surgery.Program) -> Any:
    return model.peft(program, model.attention + model.mlp, RANK, ALPHA).eval()


def _check(program: surgery.Program, factors: Any, weights: Any, restore: Any, floor: Any) -> None:
    """Check that all merges give the floor's weights, bit for bit."""
    restore()
    kept = program.merge(verify=False).folded()
    floor(None)
    expected = {name: weight.detach().clone() for name, weight in weights.items()}
    restore()
    program.merge(in_place=True)
    for name in factors:
        if not torch.equal(weights[name], expected[name]) or not torch.equal(kept[name], expected[name]):
            raise RuntimeError(f"merge of {name} differs from the floor's, so the times are not comparable")
    restore()
