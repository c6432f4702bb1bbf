"""`make sweep`: the whole chain on every architecture of the zoo, compared with plain torch.export.

capture → roles → LoRA on attn.* (on every matrix if there is no attention) → random adapters → save → load in another
process, with another seed and thread count → merge → the same on another device, adapted, in training, merged and
quantized (tests.zoo.devices) → ONNX with parity at a new shape. An architecture with attention
must have the expected number of q, k, v, qkv and out sites.

The denominator is the number of architectures that plain torch.export captures with the same inputs. The exit code is 1
below 95% of it.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

import surgery
from surgery.common.plugins import make_plugin_manager
from surgery.engine.contract.observe import observe
from tests.zoo import devices, plugin, zoo

REQUIRED = 0.95
STEPS = ("capture", "roles", "lora", "save", "load", "merge", "device", "onnx")


@dataclass
class Outcome:
    """Result for one architecture. baseline: error of plain torch.export, or None. failed: the step that failed."""

    name: str
    baseline: str | None = None
    sites: int = 0
    failed: str | None = None
    reason: str = ""
    parity: float = 0.0
    seconds: float = 0.0


def load(ref: str) -> surgery.Program:
    return surgery.load(ref, plugins=make_plugin_manager(plugins=(plugin,)))


def load_elsewhere(directory: str, out: str) -> None:
    """Runs in a separate process: loads with another seed and thread count, and writes the outputs."""
    _quiet()
    torch.manual_seed(4321)
    torch.set_num_threads(2)
    program = load(directory)
    torch.set_num_threads(1)  # sums are split by threads: compare the loading, not the summing
    torch.save(program.run(), out)


def on_device(name: str) -> dict[str, str]:
    """Runs in a separate process, which keeps the device: the forms that differ there, with the reason."""
    _quiet()
    found = devices.check(load(f"zoo:{name}"), ("lora", "int8").__contains__)
    return {form: why for form, why in found.items() if why and not why.startswith("n/a")}


def run(name: str, elsewhere: ProcessPoolExecutor, folder: Path) -> Outcome:
    """Run the chain on one architecture, up to the first step that fails."""
    outcome = Outcome(name)
    step = "baseline"
    try:
        outcome.baseline = zoo.baseline(name)
        step = "capture"
        base = load(f"zoo:{name}")
        step = "roles"
        _check_roles(name, base)
        step = "lora"
        attends = any(site.role.startswith("attn.") for site in base.sites)
        program = base.apply(surgery.Lora(target="attn.*" if attends else "all", rank=2))
        outcome.sites = len(program.journal.entries[-1].sites)
        generator = torch.Generator().manual_seed(7)
        for tensor in program.tensors.values():
            if tensor.is_floating_point():
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
        step = "save"
        program.save(folder / "saved")
        step = "load"
        elsewhere.submit(load_elsewhere, str(folder / "saved"), str(folder / "out.pt")).result()
        again = torch.load(folder / "out.pt", weights_only=True)
        seen = observe(pytree.tree_leaves(program.run()), pytree.tree_leaves(again))
        if not seen.equal:
            raise AssertionError(f"another process gives other outputs, {seen}")
        step = "merge"
        merged = program.merge()
        if len(merged.graph.nodes) != len(base.graph.nodes):
            raise AssertionError(f"{len(merged.graph.nodes)} nodes, and the base has {len(base.graph.nodes)}")
        step = "device"
        wrong = elsewhere.submit(on_device, name).result()
        if wrong:
            raise AssertionError("; ".join(f"{form}: {why}" for form, why in wrong.items()))
        step = "onnx"
        outcome.parity = merged.export(folder / "model.onnx").parity.error
    except Exception as error:
        outcome.failed = step
        outcome.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return outcome


def _check_roles(name: str, base: surgery.Program) -> None:
    expected = zoo.expected(name)
    if expected is None:
        return
    found: Counter[str] = Counter()
    for site in base.sites:
        family, _, rest = site.role.partition(".")
        if family == "attn":
            found[rest] += 1  # distinct weights: a shared one counts once
    wrong = [
        f"{role}: {found[role]}, expected {count}" for role, count in expected.items() if found[role] != count
    ]
    if wrong:
        raise AssertionError("; ".join(wrong))


def _quiet() -> None:
    import logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


Job = Callable[[str, ProcessPoolExecutor, Path], Outcome]


def _work(names: list[str], results: multiprocessing.Queue, job: Job) -> None:
    _quiet()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as elsewhere:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                begun = time.perf_counter()
                outcome = job(name, elsewhere, Path(folder))
                outcome.seconds = time.perf_counter() - begun
                results.put(outcome)


def sweep(names: list[str], workers: int = 2, job: Job = run) -> list[Outcome]:
    """Outcomes in the order of `names`; progress is printed as they come.

    Args:
        names: Names of the zoo.
        workers: Number of processes.
        job: Function that judges one architecture in a temporary folder.
    """
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue = context.Queue()
    processes = [
        context.Process(target=_work, args=(names[n::workers], results, job), daemon=False)
        for n in range(workers)
    ]
    for process in processes:
        process.start()
    found: dict[str, Outcome] = {}
    while len(found) < len(names):
        outcome = results.get()
        found[outcome.name] = outcome
        mark = "ok" if outcome.failed is None else f"FAILED at {outcome.failed}: {outcome.reason}"
        print(f"{len(found):3}/{len(names)} {outcome.name:<28} {outcome.seconds:5.1f} s  {mark}", flush=True)
    for process in processes:
        process.join()
    return [found[name] for name in names]


def report(outcomes: list[Outcome]) -> float:
    """Print the table and return the share of the denominator that passes."""
    table = Table("architecture", "plain export", "sites", "chain", "parity", "seconds", title="sweep")
    for o in outcomes:
        chain = "ok" if o.failed is None else f"{o.failed}: {o.reason}"
        table.add_row(
            o.name,
            o.baseline or "ok",
            str(o.sites),
            chain,
            f"{o.parity:.0e}" if o.parity else "",
            f"{o.seconds:.0f}",
        )
    Console(width=200).print(table)
    denominator = [o for o in outcomes if o.baseline is None]
    passed = [o for o in denominator if o.failed is None]
    share = len(passed) / len(denominator)
    mended = sum(o.baseline is not None and o.failed is None for o in outcomes)
    print(
        f"{len(outcomes)} architectures; plain torch.export captures {len(denominator)}; the whole chain passes on "
        f"{len(passed)} of those ({share:.1%}), and on {mended} that plain torch.export does not capture"
    )
    return share


def main(names: list[str]) -> int:
    chosen = names or zoo.NAMES
    outcomes = sweep(chosen)
    out = Path("out")
    out.mkdir(exist_ok=True)
    (out / "sweep.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    return 0 if report(outcomes) >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
