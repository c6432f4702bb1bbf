"""Adapt a live language model, train it with transformers' and TRL's trainers, and write it in three formats.

    python examples/smollm2_in_place.py            about twelve minutes on two cores
    python examples/smollm2_in_place.py --quick    the same steps with little data, as a test

A live SmolLM2-135M-Instruct gets two LoRAs: transformers' Trainer trains `answers`, TRL's SFTTrainer trains `sft`, 50
steps each on alpaca_en. The results are one directory with both adapters; a merged transformers directory for each,
which generates the same tokens; and one ONNX model for generation that serves both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from data import Instruction
from loop import console, megabytes, note, run, size_of, step
from rich.table import Table
from smollm2_alpaca import GGUF, Dialogue, Tutor, lessons, model_folder, open_model, read_options
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import surgery
from surgery.export.generator import open_generator
from surgery.store.hf import write_hf

TOKENS = 32
PROMPT = "Give three tips for staying healthy."


def settings(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(options.out / "runs"), "max_steps": options.steps, "learning_rate": options.lr,
        "per_device_train_batch_size": options.batch, "lr_scheduler_type": "cosine",
        "warmup_steps": options.steps // 10,
        "logging_steps": max(1, options.steps // 5), "report_to": [], "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False, **more,
    }  # fmt: skip


def with_trainer(model: Any, tutor: Tutor, learn: Sequence[Dialogue], options: argparse.Namespace) -> None:
    def collate(rows: Sequence[Dialogue]) -> dict[str, torch.Tensor]:
        inputs, labels = tutor.batch(rows)
        return {**inputs, "labels": labels}

    arguments = TrainingArguments(**settings(options, remove_unused_columns=False))
    Trainer(model=model, args=arguments, train_dataset=list(learn), data_collator=collate).train()


def with_trl(model: Any, tutor: Tutor, rows: Sequence[Instruction], options: argparse.Namespace) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [{"prompt": tutor.question(row.prompt), "completion": row.answer + "<|im_end|>"} for row in rows]
    arguments = SFTConfig(**settings(options, max_length=options.max_tokens, bf16=False))
    SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(texts), processing_class=tutor.tokenizer
    ).train()


def answer(model: Any, tutor: Tutor, **more: Any) -> torch.Tensor:
    asked = tutor.tokenizer(tutor.question(PROMPT), return_tensors="pt")
    return model.generate(**asked, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, **more)


def seconds_a_token(model: Any, tutor: Tutor) -> float:
    """Seconds per token of the fastest of three answers."""
    taken = []
    for _ in range(3):
        begun = perf_counter()
        answer(model, tutor)
        taken.append((perf_counter() - begun) / TOKENS)
    return min(taken)


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    out: Path = options.out
    tutor, rows, held_rows = lessons(options)
    learn, held_out = tutor.dialogues(rows), tutor.dialogues(held_rows)[: options.held_out]
    step("Data", f"{len(learn)} instructions with answers, {len(held_out)} held out")

    model = open_model()
    plain, scores = answer(model, tutor), {"base": tutor.perplexity(model, held_out)}
    trainers = {
        "answers": ("transformers' Trainer", lambda: with_trainer(model, tutor, learn, options)),
        "sft": ("TRL's SFTTrainer", lambda: with_trl(model, tutor, rows, options)),
    }
    tokens, used = {}, {}
    for name, (title, train) in trainers.items():
        begun = perf_counter()
        surgery.apply_(
            model, surgery.Lora(target="attn.*", rank=options.rank, alpha=2 * options.rank, label=name)
        )
        step("LoRA", f"{name}: in the live {type(model).__name__} in {perf_counter() - begun:.1f} s")
        begun = perf_counter()
        with surgery.using(model, name):
            note(
                "generates as before, to the token" if torch.equal(answer(model, tutor), plain) else "CHANGED"
            )
            train()
            model.eval()
            used[name], scores[name] = perf_counter() - begun, tutor.perplexity(model, held_out)
            tokens[name] = answer(model, tutor)
            same = torch.equal(tokens[name], answer(model, tutor, use_cache=False))
        note(
            f"{options.steps} steps of {title}, {used[name]:.0f} s: perplexity of held-out answers "
            f"{scores['base']:.3f} -> {scores[name]:.3f}"
        )
        note(f"generates {'the same' if same else 'OTHER'} tokens with and without the cache")

    surgery.save_(
        model,
        out / "adapted",
        ref=f"hf:{model_folder()}",
        task="text-generation",
        model_kwargs={"gguf_file": GGUF, "dtype": "float32"},
        overwrite=True,
    )
    graph = surgery.load(str(out / "adapted"))
    inputs, _ = tutor.batch(held_out[:2])
    step("Graph", f"{out / 'adapted'} opens as a graph of {len(graph.graph.nodes):,} nodes")
    table = Table(title="SmolLM2 on alpaca_en, adapted in place", title_style="bold")
    for title in ("", "perplexity", "graph", "merged, from_pretrained", "onnxruntime"):
        table.add_column(title, justify="right" if title else "left")
    hf = {}
    for name in trainers:
        alone = graph.only(name)
        with surgery.using(model, name), torch.no_grad():
            equal = torch.equal(model(**inputs).logits, alone.run(**inputs)["logits"])
        write_hf(alone.merge(), out / f"hf-{name}", overwrite=True)
        reopened = AutoModelForCausalLM.from_pretrained(out / f"hf-{name}").eval()
        same = torch.equal(answer(reopened, tutor), tokens[name])
        hf[name] = (
            "equal bit for bit" if equal else "DIFFERS",
            f"{'the same' if same else 'OTHER'} {TOKENS} tokens",
        )

    step("ONNX", "one model for generation, with an adapter file for each")
    made = graph.export_generation(out / "onnx", adapters_as_inputs=True, overwrite=True)
    note(
        f"{made.tokens} greedy and {made.sampled} sampled tokens equal, {made.ties} ties; logits within "
        f"{made.error:.0e} of their scale; {made.seconds:.0f} s, {megabytes(made.size)}"
    )
    generator = open_generator(out / "onnx")
    for name in trainers:
        with generator.adapter(name):
            same = torch.equal(answer(generator, tutor), tokens[name])
        size = made.adapters[name].stat().st_size / 1e6
        found = f"{'the same' if same else 'OTHER'} {TOKENS} tokens, {size:.1f} MB"
        table.add_row(name, f"{scores[name]:.3f}", *hf[name], found)
    console.print()
    console.print(table)
    with surgery.using(model, "sft"):
        eager = seconds_a_token(model, tutor)
    with generator.adapter("sft"):
        onnx = seconds_a_token(generator, tutor)
    note(f"tokens a second, one row: {1 / eager:.1f} in transformers, {1 / onnx:.1f} in onnxruntime")
    surgery.remove_(model)
    note(
        f"removed: {'the tokens of the base' if torch.equal(answer(model, tutor), plain) else 'OTHER tokens'}"
    )
    step("Files", f"{out}/")
    for path in (out / "adapted", *(out / f"hf-{name}" for name in trainers), out / "onnx"):
        note(f"{path.name:<12} {megabytes(size_of(path)):>9}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return read_options(
        __doc__, Path("out/in_place"), full=(50, 4, 40, 192), quick=(2, 2, 4, 64), given=arguments
    )


if __name__ == "__main__":
    run(lambda: main(parse()))
