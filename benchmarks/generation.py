"""Generation in onnxruntime with the files of `surgery export --generate`, against transformers eager and optimum.

Greedy decoding of one row after a prompt of 24 tokens. The benchmark stops if an export of ours generates other tokens
than eager. There are three exports of SmolLM2 (a random llama with --quick): LoRA merged, LoRA kept as a branch, and
LoRA as inputs with the adapter active. optimum needs another version of transformers, so it runs in a separate process:
set SURGERY_OPTIMUM to a Python that has optimum-onnx (pip install 'optimum-onnx[onnxruntime]'); without it, optimum is
skipped. Wall time.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import surgery
from benchmarks.models import randomise, smollm2
from benchmarks.timing import Row, Times, compare
from surgery.export.generator import open_generator
from surgery.store.hf import write_hf

TOKENS, PROMPT = 32, 24
Answer = Callable[[], list[int]]


def run(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        yield from _compare(Path(folder), stack, quick)


def _compare(folder: Path, stack: ExitStack, quick: bool) -> Iterator[Row]:
    program = _tiny(folder) if quick else smollm2().program()
    adapted = randomise(program.apply(surgery.Lora(target="attn.*", rank=8)))
    merged = adapted.merge()
    merged.export_generation(folder / "merged")
    adapted.export_generation(folder / "adapted")
    adapted.export_generation(folder / "inputs", adapters_as_inputs=True)
    write_hf(merged, folder / "hf")
    ids = torch.randint(100, 900, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    answers: dict[str, Answer] = {"eager": _answer(merged.live(), ids)}
    for name in ("merged", "adapted", "inputs"):
        generator = open_generator(folder / name, session_options=_options())
        if name == "inputs":
            stack.enter_context(generator.adapter("lora"))
        answers[name] = _answer(generator, ids)
    python = os.environ.get("SURGERY_OPTIMUM")
    if python:
        peer = stack.enter_context(_Peer(python, folder, ids))
        answers["optimum"] = peer.answer
    times = _measure(answers, 2 if quick else 7)
    title = "llama" if quick else "SmolLM2"
    for name, what in (("merged", "merged"), ("adapted", "LoRA kept"), ("inputs", "LoRA as inputs")):
        rate = TOKENS / times.median(name)
        yield compare("generation", f"{title}, {what}", times, name, "eager", note=f"{rate:.1f} tokens/s")
    for name in ("adapted", "inputs"):
        yield compare("generation", f"{title}, {name} over merged", times, name, "merged")
    if python:
        rate = TOKENS / times.median("optimum")
        yield compare(
            "generation", f"{title}, merged", times, "merged", "optimum", note=f"optimum {rate:.1f} tokens/s"
        )


def _tiny(folder: Path) -> surgery.Program:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    return surgery.load(f"hf:{folder / 'base'}")


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return options


def _answer(model: Any, ids: torch.Tensor) -> Answer:
    given = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def answer() -> list[int]:
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **given)[0].tolist()

    return answer


def _measure(answers: dict[str, Answer], rounds: int) -> Times:
    found: dict[str, list[float]] = {name: [] for name in answers}
    for number in range(-1, rounds):
        said = {}
        for name, answer in answers.items():
            begun = time.perf_counter()
            said[name] = answer()
            if number >= 0:
                found[name].append(time.perf_counter() - begun)
        for name, tokens in said.items():
            if name != "optimum" and tokens != said["eager"]:
                raise RuntimeError(
                    f"{name} generates other tokens than eager, so the times are not comparable"
                )
            if len(tokens) != len(said["eager"]):
                raise RuntimeError(f"{name} generates another number of tokens than eager")
    return Times(found)


class _Peer:
    """optimum in another Python process: it exports once, then answers each line of input with a line of tokens."""

    def __init__(self, python: str, folder: Path, ids: torch.Tensor) -> None:
        script = Path(__file__).with_name("optimum_peer.py")
        line = [
            python,
            str(script),
            str(folder / "hf"),
            str(folder / "optimum"),
            str(torch.get_num_threads()),
        ]
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.asked = json.dumps({"ids": ids.tolist(), "tokens": TOKENS})

    def __enter__(self) -> _Peer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()

    def answer(self) -> list[int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(self.asked + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("["):
                return json.loads(line)
        raise RuntimeError(
            "optimum's process ended; run benchmarks/optimum_peer.py directly to see the error"
        )
