"""LoRA in a live transformers model against PEFT's: injection, a training step, and generation.

Injection: rank 8 on the 168 linear layers of a llama with 374M parameters (24 layers, random weights). "first" includes
the capture of the model, which finds roles, ties and refusals, and compares outputs before and after; "again" is a
second adapter on the same live model. Step and generation: SmolLM2 (MiniLM with --quick, which does not generate), with
the same base, factors and inputs; the benchmark stops if losses or tokens differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import surgery
from benchmarks.models import Model, minilm, randomise, require, smollm2
from benchmarks.step import ALPHA, BATCH, RANK, SAME_LOSS, inputs_of, step_of
from benchmarks.timing import Row, Variant, compare, measure
from surgery.live.state import state_of

TOKENS = 32
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run(quick: bool) -> Iterator[Row]:
    yield from _injection(quick)
    model = minilm() if quick else smollm2()
    yield from _running(model, rounds=3 if quick else 7, batch=2 if quick else BATCH, generates=not quick)


def _injection(quick: bool) -> Iterator[Row]:
    require("peft", "the comparison with PEFT")
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = (2, 64) if quick else (24, 1024)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    torch.manual_seed(0)
    bare = LlamaForCausalLM(config).eval()
    size = sum(p.numel() for p in bare.parameters())
    lora = surgery.Lora(target="attn.*,mlp.*", rank=RANK, alpha=ALPHA)
    theirs = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(ALL))

    held: list[Any] = []

    def clean() -> Any:
        while held:
            held.pop().unload()
        if state_of(bare) is not None:
            surgery.remove_(bare)
        return bare

    def planned() -> Any:
        surgery.apply_(clean(), surgery.Lora(target="attn.q", rank=1, label="before"))
        return bare

    def again(model: Any) -> None:
        surgery.apply_(model, lora.model_copy(update={"label": "again"}))

    def unverified(model: Any) -> None:
        surgery.apply_(model, lora.model_copy(update={"label": "again"}), verify=False)

    def injected(model: Any) -> None:
        held.append(peft.get_peft_model(model, theirs))

    variants = {
        "PEFT": Variant(injected, clean),
        "ours, again": Variant(again, planned),
        "ours, again, unverified": Variant(unverified, planned),
        "ours, first": Variant(lambda model: surgery.apply_(model, lora), clean),
    }
    times = measure(variants, 1 if quick else 3)
    what = f"injection, {7 * layers} linears of {size / 1e6:.0f}M"
    for name in ("ours, again, unverified", "ours, again", "ours, first"):
        yield compare("in_place", f"{what}: {name.removeprefix('ours, ')}", times, name, "PEFT")
    clean()


def _running(model: Model, rounds: int, batch: int, generates: bool) -> Iterator[Row]:
    inputs = inputs_of(model, batch)
    live: Any = model.eager()
    program = randomise(surgery.apply_(live, surgery.Lora(target="attn.*", rank=RANK, alpha=ALPHA)))
    modules: dict[str, Any] = {"ours": live, "PEFT": model.peft(program, model.attention, RANK, ALPHA)}
    base: nn.Module = model.eager()
    if generates:
        yield from _generating({**modules, "base": base}, rounds)
    base.requires_grad_(False).get_parameter(model.first).requires_grad_(True)
    modules["frozen base"] = base
    losses: dict[str, list[float]] = {name: [] for name in modules}
    variants = {}
    for name, module in modules.items():
        module.train()
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
        variants[name] = Variant(step_of(model, module, optimizer, inputs, losses[name]))
    times = measure(variants, rounds)
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["PEFT"], strict=True))
    if not gap <= SAME_LOSS:
        raise RuntimeError(f"{model.name}: the losses of ours and PEFT differ by {gap:.1e}")
    yield compare(
        "in_place",
        f"{model.name}: step of apply_",
        times,
        "ours",
        "PEFT",
        note=f"losses agree within {gap:.0e}",
    )
    for name in ("ours", "PEFT"):
        yield compare("in_place", f"{model.name}: {name} over base", times, name, "frozen base")


def _generating(modules: dict[str, Any], rounds: int) -> Iterator[Row]:
    ids = torch.randint(1000, 9000, (1, 24), generator=torch.Generator().manual_seed(0))
    given = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    found: dict[str, torch.Tensor] = {}

    def answer(name: str) -> Any:
        def run(_: Any) -> None:
            with torch.no_grad():
                found[name] = modules[name].eval().generate(input_ids=ids, **given)

        return run

    times = measure({name: Variant(answer(name)) for name in modules}, rounds)
    if not torch.equal(found["ours"], found["PEFT"]) or torch.equal(found["ours"], found["base"]):
        raise RuntimeError(
            "ours and PEFT generate different tokens, or the adapter does not change the base's"
        )
    yield compare(
        "in_place", f"SmolLM2: {TOKENS} tokens of apply_", times, "ours", "PEFT", note="the same tokens"
    )
    for name in ("ours", "PEFT"):
        yield compare("in_place", f"SmolLM2: tokens, {name} over base", times, name, "base")
