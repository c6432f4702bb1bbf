"""QLoRA on SmolLM2 against LoRA on fp32: `python -m benchmarks.qlora` (about 25 minutes; --quick: two steps).

Both train rank 8 on the attention for the same steps on alpaca_en's answers, each in its own process. Memory is the
resident size of that process, after loading and at its peak during training. QLoRA's base is nf4 (groups of 64); its
fp32 weights are freed after quantization (`Program.release`). The trained adapter is then merged into the codes in
three ways, and the perplexity of held-out answers shows the cost of each. The same is done with int8.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import surgery
from benchmarks.models import smollm2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

BASES = ("fp32", "nf4", "int8")
WAYS = ("keep", "requantize", "residual", "auto")
BUDGET = 0.1


def resident() -> float:
    """Resident size of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class Peak(threading.Thread):
    """Largest resident size during the block, sampled a hundred times per second."""

    def __enter__(self) -> Peak:
        self.most, self.ended = resident(), threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, resident())

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.join()


def one(kind: str, out: Path, quick: bool) -> dict[str, Any]:
    """Train on one base and merge, in this process."""
    import smollm2_alpaca as example
    from loop import train

    torch.manual_seed(0)
    options = example.parse(["--quick"] if quick else [])
    tutor, rows, held_rows = example.lessons(options)
    learn, held = tutor.dialogues(rows), tutor.dialogues(held_rows)[: options.held_out]
    program = smollm2().program()
    if kind != "fp32":
        program = program.apply(surgery.Quantize(target="attn.*,mlp.*", format=kind))
    found: dict[str, Any] = {"base": kind, "before": tutor.perplexity(program.graph_module, held)}
    adapted = program.apply(surgery.Lora(target="attn.*", rank=8, alpha=16))
    module = adapted.module().train()
    if kind != "fp32":
        adapted.release()
    del program
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # Returns freed memory to the system, so that it is not counted.
    found["loaded"] = resident()
    begun = time.process_time()
    with Peak() as peak:
        batches = tutor.epochs(learn, options.batch)
        losses = []

        def loss(batch: Any) -> torch.Tensor:
            value = example.answer_loss(module, *batch)
            losses.append(float(value.detach()))
            return value

        train(module, batches, loss, steps=options.steps, lr=1e-3)
    found |= {
        "peak": peak.most,
        "seconds": time.process_time() - begun,
        "loss": sum(losses[-8:]) / len(losses[-8:]),
    }
    module.eval()
    found["after"] = tutor.perplexity(module, held)
    data = [((), tutor.batch(learn[i : i + 2])[0]) for i in range(0, 2 if quick else 8, 2)]
    merged: dict[str, Any] = {}
    for way in WAYS if kind != "fp32" else ():
        if way == "keep":
            merged[way] = {"perplexity": found["after"]}
            continue
        try:
            result = adapted.merge(quantized=way, budget=BUDGET, data=data)  # type: ignore[arg-type]
        except surgery.SurgeryError as error:
            merged[way] = {"refused": str(error)}
            continue
        entry = result.journal.entries[-1]
        choices = entry.options["choices"].values()
        errors = [choice["errors"].get(choice["how"], 0.0) for choice in choices]
        merged[way] = {
            "perplexity": tutor.perplexity(result.graph_module, held),
            "how": {how: sum(c["how"] == how for c in choices) for how in {c["how"] for c in choices}},
            "mean": sum(errors) / len(errors),
            "worst": max(errors),
            "lost": sum(c["lost"] if c["how"] != "keep" else 0.0 for c in choices) / len(errors),
        }
    found["merged"] = merged
    out.write_text(json.dumps(found))
    return found


Lines = tuple[str, tuple[str, ...], list[list[str]]]


def _trained(results: list[dict[str, Any]]) -> Lines:
    header = ("base", "perplexity", "trained", "last loss", "loaded", "peak", "CPU seconds")
    lines = []
    for row in results:
        memory = [f"{row[name]:,.0f} MB" for name in ("loaded", "peak")]
        scores = [f"{row[name]:.3f}" for name in ("before", "after", "loss")]
        lines.append([row["base"], *scores, *memory, f"{row['seconds']:.0f}"])
    return "LoRA on SmolLM2", header, lines


def _merged(results: list[dict[str, Any]]) -> Lines:
    title = f"Merged into the codes (budget: {BUDGET:.0%} of the adapter's contribution)"
    header = ("base", "way", "perplexity", "sites", "mean error", "worst", "lost of the adapter")
    lines = []
    for row in results:
        for way, found in row["merged"].items():
            if "refused" in found:
                lines.append([row["base"], way, found["refused"][:90], "", "", "", ""])
                continue
            said = ", ".join(f"{count} {how}" for how, count in found.get("how", {}).items())
            errors = [f"{found[name]:.2%}" if name in found else "" for name in ("mean", "worst", "lost")]
            lines.append([row["base"], way, f"{found['perplexity']:.3f}", said, *errors])
    return title, header, lines


def _page(*tables: Lines) -> str:
    said = ["# QLoRA", "", f"`python -m benchmarks.qlora --write` wrote this page on {date.today()}.", ""]
    said += [(__doc__ or "").strip(), ""]
    for title, header, lines in tables:
        said += [f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        said += [f"| {' | '.join(line)} |" for line in lines] + [""]
    return "\n".join(said)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qlora", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/qlora.md")
    parser.add_argument("--one", choices=BASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    if asked.one:
        one(asked.one, asked.out, asked.quick)
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in BASES:
            print(f"{kind} …", file=sys.stderr, flush=True)
            out = Path(folder, f"{kind}.json")
            line = [sys.executable, "-m", "benchmarks.qlora", "--one", kind, "--out", str(out)]
            subprocess.run([*line, *(["--quick"] if asked.quick else [])], check=True, cwd=ROOT)
            results.append(json.loads(out.read_text()))
    console = Console(width=None if sys.stdout.isatty() else 150)
    for title, header, lines in (_trained(results), _merged(results)):
        table = Table(*header, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    if asked.write:
        (ROOT / "benchmarks" / "qlora.md").write_text(_page(_trained(results), _merged(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
