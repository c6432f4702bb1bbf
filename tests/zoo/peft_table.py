"""`python -m tests.zoo.peft_table`: PEFT's own 331 custom models with configurations, each through the whole way.

PEFT makes the model, its adapter is moved to random values and saved. Then:

    peft     PEFT loads its own checkpoint on a fresh base; where it gives other outputs, the row does not count
    import   surgery imports the checkpoint
    run      the program gives PEFT's outputs
    load     saved and loaded, it gives the same ones bit for bit
    back     exported to PEFT again, PEFT's own class loads it without missing keys and gives its first outputs
    merge    the merged program gives them; what PEFT cannot merge either may stay as it is
    onnx     the exported file gives them in onnxruntime

Arguments are parts of titles or types to run, such as LOHA; without arguments every row runs. `out/peft.json` has the
outcomes. The exit code is 1 if any row gives other outputs than PEFT's, or if fewer than `REQUIRED` of the rows go the
whole way. What PEFT cannot merge is refused and counts as refused, by its reason.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import surgery
from surgery.common.errors import SurgeryError
from tests.zoo import peft_cases

REQUIRED = 0.95
COVERAGE = Path("docs/coverage.md")  # a run of every row rewrites its line
STEPS = ("peft", "import", "run", "load", "back", "merge", "onnx")
# fp32, with sums in another order; a merged weight is rounded once more. Over the largest value.
TOLERANCE, MERGED = 2e-5, 1e-4


@dataclass
class Outcome:
    """Result for one row. failed: the step that failed, or None. wrong: outputs differ, and nothing was refused."""

    number: int
    title: str
    method: str
    model: str
    passes: str = ""
    failed: str | None = None
    reason: str = ""
    wrong: bool = False
    error: float = 0.0
    seconds: float = 0.0


class Differs(AssertionError):
    """The outputs are not PEFT's."""


def inputs_of(case: peft_cases.Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.number)
    if case.model.startswith("Emb"):
        return torch.randint(0, 100, (9, 10), generator=generator)
    return torch.randn(9, 10, generator=generator)


def stir(model: nn.Module, seed: int) -> None:
    """Move every parameter that trains to another random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    if got.shape != expected.shape:
        raise Differs(f"shape {tuple(got.shape)}, and PEFT's is {tuple(expected.shape)}")
    gap = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
    return gap if gap == gap else float("inf")


def run(case: peft_cases.Case, models: Any, folder: Path) -> Outcome:
    """Take one row the whole way, up to the first step that fails."""
    outcome = Outcome(case.number, case.title, case.method, case.model)
    begun, step = time.perf_counter(), "peft"

    def hold(got: Tensor, expected: Tensor, allowed: float) -> None:
        gap = difference(got, expected)
        outcome.error = max(outcome.error, gap)
        if not gap <= allowed:
            raise Differs(f"the outputs differ by {gap:.1e}")

    def reload(path: Path) -> Tensor:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again = PeftModel.from_pretrained(models.from_pretrained(case.model), str(path)).eval()
        missing = [str(w.message) for w in said if "missing" in str(w.message)]
        if missing:
            raise AssertionError(f"PEFT says: {missing[0]}")
        with torch.no_grad():
            return again(x)

    try:
        x = inputs_of(case)
        torch.manual_seed(case.number)
        theirs = get_peft_model(models.from_pretrained(case.model), case.config_cls(**case.kwargs)).eval()
        stir(theirs, case.number)
        with torch.no_grad():
            expected = theirs(x)
        theirs.save_pretrained(str(folder / "theirs"))
        hold(reload(folder / "theirs"), expected, TOLERANCE)
        base = captured(models.from_pretrained(case.model).eval(), x)
        step = "import"
        program = surgery.import_peft(folder / "theirs", base)
        outcome.passes = ", ".join(e.id for e in program.journal if e.kind == "rewrite")
        step = "run"
        hold(program.run(X=x), expected, TOLERANCE)
        step = "load"
        program.save(folder / "saved")
        again = surgery.load(str(folder / "saved"), base=base)  # type: ignore[arg-type]
        if not torch.equal(again.run(X=x), program.run(X=x)):
            raise Differs("loaded, the program gives other outputs")
        step = "back"
        surgery.export_peft(again, folder / "ours")
        hold(reload(folder / "ours"), expected, TOLERANCE)
        step = "merge"
        try:
            merged = again.merge()
        except SurgeryError:
            if can_merge(theirs):
                raise
            outcome.passes += ", unmerged as in PEFT"
        else:
            hold(merged.run(X=x), expected, MERGED)
        step = "onnx"
        again.export(folder / "model.onnx")
        hold(of_onnx(folder / "model.onnx", x), expected, TOLERANCE)
    except Exception as error:
        outcome.failed = step
        outcome.wrong = step != "peft" and not isinstance(error, SurgeryError)
        outcome.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    outcome.seconds = time.perf_counter() - begun
    return outcome


def can_merge(theirs: Any) -> bool:
    """True if PEFT itself merges the adapter."""
    try:
        theirs.merge_and_unload()
    except Exception:
        return False
    return True


def captured(module: nn.Module, x: Tensor) -> surgery.Program:
    """The base as a program, with a dynamic batch where the model has one."""
    try:
        return surgery.capture(module, {"X": x})
    except SurgeryError:
        return surgery.capture(module, {"X": x}, dynamic={})


def of_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {i.name: x.numpy() for i in session.get_inputs()}
    return torch.from_numpy(session.run(None, given)[0])


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def table(wanted: list[str]) -> list[Outcome]:
    """Outcomes of the rows whose title or type contains one of `wanted`; of all without it."""
    rows, models = peft_cases.cases()
    chosen = [
        r for r in rows if not wanted or any(w in (r.method, str(r.number)) or w in r.title for w in wanted)
    ]
    found = []
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(case, models, Path(folder))
        found.append(outcome)
        mark = f"ok ({outcome.passes})" if outcome.failed is None else f"{outcome.failed}: {outcome.reason}"
        print(
            f"{case.number:3} {case.method:<16} {case.title:<45} {outcome.seconds:4.1f} s  {mark}", flush=True
        )
    return found


def line(outcomes: list[Outcome]) -> str:
    """The sentence for docs/coverage.md."""
    counted = [o for o in outcomes if o.failed != "peft"]
    whole = sum(o.failed is None for o in counted)
    refused = sum(o.failed is not None and not o.wrong for o in counted)
    lost = len(outcomes) - len(counted)
    unread = f", {lost} that PEFT itself does not reload" if lost else ""
    return (
        f"{len(outcomes)} rows of peft {peft_cases.VERSION}{unread}: {whole} go the whole way, {refused} are refused "
        f"with a reason, {sum(o.wrong for o in counted)} differ"
    )


def report(outcomes: list[Outcome]) -> None:
    """Print the table by type, the reasons, and the sentence."""
    shown = Table("type", "rows", "whole way", *STEPS, title="PEFT's own custom models")
    for method in dict.fromkeys(o.method for o in outcomes):
        own = [o for o in outcomes if o.method == method]
        failed = Counter(o.failed for o in own)
        shown.add_row(method, str(len(own)), str(failed[None]), *(str(failed[s] or "") for s in STEPS))
    Console(width=140).print(shown)
    for reason, count in Counter(f"{o.failed}: {o.reason}" for o in outcomes if o.failed).most_common():
        print(f"{count:3} {reason}")
    print(line(outcomes))


def main(wanted: list[str]) -> int:
    quiet()
    outcomes = table(wanted)
    out = Path("out")
    out.mkdir(exist_ok=True)
    (out / "peft.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    report(outcomes)
    if not wanted:
        text = COVERAGE.read_text()
        COVERAGE.write_text(re.sub(r"^\d+ rows of peft .*$", f"{line(outcomes)}.", text, flags=re.MULTILINE))
    counted = [o for o in outcomes if o.failed != "peft"]
    enough = sum(o.failed is None for o in counted) >= REQUIRED * len(counted)
    return 0 if enough and not any(o.wrong for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
