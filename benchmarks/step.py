"""A LoRA training step against PEFT's: forward, backward, AdamW step, zero_grad.

Rank 8 on q, k, v and out, no dropout, a batch of 16 × 48 tokens. A third of the rows is padded, as in real batches;
without padding the eager model drops its mask and uses another attention. Both sides have the same base, factors and
inputs, and the benchmark stops if their losses differ.

"added" is the time of a step minus that of the frozen eager base. One small parameter of the base's first layer trains,
so that the gradient passes through the same layers as LoRA's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from benchmarks.models import Model, minilm, randomise, smollm2
from benchmarks.timing import Row, Variant, compare, measure, quartiles

AIM = 0.92
BATCH, LENGTH, RANK, ALPHA = 16, 48, 8, 16.0
EPSILON = torch.finfo(torch.float32).eps  # A mean over a batch often agrees to the last bit.
SAME_LOSS = 1e-4  # Relative, after a few steps of fp32 with different orders of summation.


def run(quick: bool) -> Iterator[Row]:
    yield from _compare(minilm(), rounds=3 if quick else 25, batch=2 if quick else BATCH)
    if not quick:
        yield from _compare(smollm2(), rounds=4, batch=BATCH)


def _compare(model: Model, rounds: int, batch: int) -> Iterator[Row]:
    inputs = inputs_of(model, batch)
    program = randomise(model.program().apply(surgery.Lora(target="attn.*", rank=RANK, alpha=ALPHA)))
    peer = model.peft(program, model.attention, RANK, ALPHA).train()
    base = model.eager().train().requires_grad_(False)
    base.get_parameter(model.first).requires_grad_(True)
    modules = {"ours": program.module().train(), "PEFT": peer, "frozen base": base}
    losses: dict[str, list[float]] = {name: [] for name in modules}
    variants = {}
    for name, module in modules.items():
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
        variants[name] = Variant(step_of(model, module, optimizer, inputs, losses[name]))
    times = measure(variants, rounds)
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["PEFT"], strict=True))
    if not gap <= SAME_LOSS:
        raise RuntimeError(
            f"{model.name}: the losses of ours and PEFT differ by {gap:.1e}, so the times are not comparable"
        )
    note = f"losses agree within {max(gap, EPSILON):.0e}"
    yield compare("step", f"{model.name}: LoRA step", times, "ours", "PEFT", AIM, note)
    for name in ("ours", "PEFT"):
        yield compare("step", f"{model.name}: {name} over base", times, name, "frozen base")
    yield _added(model, times.rounds)


def _added(model: Model, rounds: Any) -> Row:
    pairs = zip(rounds["ours"], rounds["PEFT"], rounds["frozen base"], strict=True)
    added = [(ours - base, peer - base) for ours, peer, base in pairs]
    ours, peer = (statistics.median(side) for side in zip(*added, strict=True))
    ratios = [a / b for a, b in added if b > 0]  # In a noisy round the base can be slower.
    low, high = quartiles(ratios) if ratios else (None, None)
    ratio = ours / peer if peer > 0 else None
    what = f"{model.name}: added by LoRA"
    return Row("step", what, "PEFT", ours, peer, ratio, low, high, note="step minus the frozen base")


def step_of(
    model: Model, module: nn.Module, optimizer: Any, inputs: dict[str, Tensor], losses: list[float]
) -> Any:
    def step(_: None) -> None:
        loss = model.loss(module(**inputs), inputs["input_ids"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    return step


def inputs_of(model: Model, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 9000, (batch, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, LENGTH - 8 :] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    return {**found, "token_type_ids": torch.zeros_like(ids)} if model.task is None else found
