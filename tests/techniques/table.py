"""`make techniques`: runs the conformance kit with every technique of the catalogue on eight models.

    python -m tests.techniques [--only NAME,…] [--models NAME,…] [--workers 2] [--resume | --missing]

A full run takes hours on two cores, so each cell is stored in docs/techniques.json when it is finished. Cells that were
not requested stay, even if older sources made them; the page lists the number of cells for each version of the sources.
--resume computes only cells that are missing for the current sources, --missing only cells that are missing entirely.
docs/techniques.md is written once every cell exists. The exit code is 1 if a mandatory cell has not passed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from surgery.api.programs import Pass, Program
from surgery.common.errors import PassError
from surgery.testing import check_pass
from tests.techniques.catalogue import Technique, catalogue
from tests.techniques.models import MODELS, program

TITLES = {
    "minilm": "MiniLM", "smollm2": "SmolLM2", "t5": "T5", "vit": "ViT", "resnet18": "ResNet-18",
    "wav2vec2": "wav2vec2", "mixtral": "Mixtral", "mamba": "Mamba",
    "mamba2": "Mamba 2", "qwen3_5": "Qwen3.5",
}  # fmt: skip
PAGE, KEPT = Path("docs/techniques.md"), Path("docs/techniques.json")


@dataclass(frozen=True)
class Cell:
    """One cell.

    outcome: "passed", "failed" or "refused". detail: failed checks, or the message. sources: hash of the source files.
    """

    technique: str
    model: str
    outcome: str
    passed: int
    skipped: dict[str, str]
    detail: str
    seconds: float
    sources: str = ""

    @property
    def text(self) -> str:
        if self.outcome == "passed":
            return f"✓ {self.passed}" + (f" ({len(self.skipped)} n/a)" if self.skipped else "")
        return "refused" if self.outcome == "refused" else "**✗**"


def cell(technique: Technique, model: str) -> Cell:
    """Apply one technique to one model. All errors except a refusal by it, or by a pass before it, are failures."""
    started = time.perf_counter()
    passed, skipped = 0, {}
    try:
        torch.manual_seed(0)
        base, pass_ = program(model), technique.make(model)
        # The passes before it may be refused too.
        refusal = next((said for each in technique.before(model) if (said := _refusal(each, base))), None)
        if refusal is None:
            base = base.apply(*technique.before(model)) if technique.before(model) else base
            refusal = _refusal(pass_, base)
        if refusal is not None:
            outcome, detail = "refused", refusal
        else:
            report = check_pass(pass_, base, raises=False)
            passed, skipped = len(report.passed), report.skipped
            outcome = "passed" if report.ok else "failed"
            detail = "; ".join(f"{check}: {why}" for check, why in report.failed.items())
    except Exception as error:
        outcome, detail = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    seconds = time.perf_counter() - started
    return Cell(technique.name, model, outcome, passed, skipped, detail, seconds, sources())


def _refusal(pass_: Pass, base: Program) -> str | None:
    """The pass's error message if it cannot be applied, else None."""
    try:
        base.apply(pass_, verify=False)
    except PassError as error:
        return str(error)
    return None


def _work(jobs: multiprocessing.Queue, results: multiprocessing.Queue) -> None:
    import logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    known = {technique.name: technique for technique in catalogue()}
    for name, model in iter(jobs.get, None):
        results.put(cell(known[name], model))


def sources() -> str:
    """Hash of the source files that the cells depend on."""
    digest = hashlib.sha256()
    for path in sorted([*Path("surgery").rglob("*.py"), *Path("tests/techniques").glob("[cm]*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def table(wanted: list[tuple[str, str]], workers: int, kept: dict[tuple[str, str], Cell]) -> None:
    """Compute cells and store each one when it is finished."""
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    for job in [*wanted, *[None] * workers]:
        jobs.put(job)
    processes = [context.Process(target=_work, args=(jobs, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    for number in range(len(wanted)):
        done = results.get()
        kept[done.technique, done.model] = done
        _keep(list(kept.values()))
        said = done.detail if done.outcome != "passed" else f"{done.passed} checks"
        print(
            f"{number + 1:3}/{len(wanted)} {done.technique:<32} {done.model:<9} {done.seconds:5.0f} s  "
            f"{done.outcome}: {said}",
            flush=True,
        )
    for process in processes:
        process.join()


def _keep(cells: list[Cell]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps({"cells": [asdict(c) for c in cells]}, indent=1))


def _kept() -> dict[tuple[str, str], Cell]:
    """Cells of earlier runs."""
    if not KEPT.exists():
        return {}
    cells = [Cell(**row) for row in json.loads(KEPT.read_text())["cells"]]
    return {(c.technique, c.model): c for c in cells}


def markdown(techniques: list[Technique], models: list[str], cells: list[Cell]) -> str:
    """The page: the table, followed by the message of every refusal."""
    found = {(c.technique, c.model): c for c in cells}
    made = Counter(c.sources for c in cells)
    lines = [
        "# Techniques",
        "",
        f"`make techniques` wrote this page on {date.today()}; no cell is written by hand. Versions of the sources",
        f"(hash and number of cells): {', '.join(f'{h[:8]} {n}' for h, n in made.most_common())}. A cell has",
        "the number of checks of `surgery.testing.check_pass` that a technique passes on a model (n/a: not applicable;",
        "`techniques.json` has the reason). *refused* means that the pass refuses the model, with a message that is",
        "listed below. MiniLM and SmolLM2 are the real checkpoints cut to their first two layers, ResNet-18 is timm's",
        "at full size with random weights, the other models are tiny and random. • marks cells in which the technique",
        "must work.",
        "",
    ]
    for family in dict.fromkeys(t.family for t in techniques):
        lines += [
            f"## {family.capitalize()}",
            "",
            "| technique | " + " | ".join(TITLES[m] for m in models) + " |",
        ]
        lines += ["|---" * (len(models) + 1) + "|"]
        for technique in (t for t in techniques if t.family == family):
            row = []
            for model in models:
                mark = " •" if model in technique.mandatory else ""
                row.append(found[technique.name, model].text + mark)
            lines.append(f"| `{technique.name}` | " + " | ".join(row) + " |")
        lines.append("")
    refusals: dict[str, list[str]] = {}
    for c in cells:
        if c.outcome != "passed":
            refusals.setdefault(c.detail, []).append(f"`{c.technique}` on {TITLES[c.model]}")
    if refusals:
        lines += ["## Refusals and failures", ""]
        lines += [f"- {', '.join(where)}: {why}" for why, where in refusals.items()]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="techniques, comma-separated (all by default)")
    parser.add_argument("--models", default="", help="models, comma-separated (all by default)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--resume", action="store_true", help="keep cells of the current sources that did not fail"
    )
    parser.add_argument("--missing", action="store_true", help="keep all cells that did not fail")
    asked = parser.parse_args()
    only = [name.strip() for name in asked.only.split(",") if name.strip()]
    models = [name.strip() for name in asked.models.split(",") if name.strip()] or list(MODELS)
    techniques = [t for t in catalogue() if not only or t.name in only or t.name.split()[0] in only]
    every = [(technique.name, model) for model in MODELS for technique in catalogue()]
    kept = {pair: cell for pair, cell in _kept().items() if pair in every}
    now = sources()

    def stays(cell: Cell | None) -> bool:
        if cell is None or cell.outcome == "failed":
            return False
        return asked.missing or (asked.resume and cell.sources == now)

    names = {technique.name for technique in techniques}
    wanted = [pair for pair in every if pair[0] in names and pair[1] in models and not stays(kept.get(pair))]
    table(wanted, asked.workers, kept)
    techniques, models = catalogue(), list(MODELS)
    cells = [kept[pair] for pair in every if pair in kept]
    missing = [
        c for t in techniques for c in cells
        if c.technique == t.name and c.model in t.mandatory and c.outcome != "passed"
    ]  # fmt: skip
    failed = [c for c in cells if c.outcome == "failed" and c not in missing]
    if len(cells) == len(every):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(markdown(techniques, models, cells))
        print(f"wrote {PAGE}")
    counts = {kind: sum(c.outcome == kind for c in cells) for kind in ("passed", "refused", "failed")}
    said = ", ".join(f"{n} {k}" for k, n in counts.items())
    print(f"{len(cells)} of {len(every)} cells: {said}")
    for c in [*missing, *failed]:
        print(f"  {c.technique} on {c.model}: {c.outcome}: {c.detail}")
    return 1 if missing or failed else 0
