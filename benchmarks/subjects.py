"""Models of the compression benchmark, with a quality measure for ONNX files on data that packages ship."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from benchmarks.models import MissingPeer, minilm, require, smollm2
from surgery.export.runtime import OnnxModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

FILM = ROOT / "out" / "film" / "adapted"
WINDOW, WINDOWS, CALIBRATION = 128, 144, 8  # With 24 windows a loss of 1% has an error of 0.3%.


@dataclass(frozen=True)
class Subject:
    """A model with its evaluation.

    Attributes:
        name: Name in the table.
        measure: Name of the quality measure.
        program: The model.
        target: Linear layers.
        quality: Quality of an ONNX file.
        inputs: Inputs for latency, by the number of rows.
        data: Calibration data; quality is measured on other data.
        up: True if larger quality is better.
        rest: Tables or convolutions; formats for linear layers leave them, so they become int8.
        head: Output layer; formats for linear layers leave it too, unless they round activations.
        products: Target of other passes, if it is larger than `target`.
        notes: Remarks for the table.
        token: Inputs of one row and one token, for models that generate.
        rounds: Rounds of timing; short runs need more.
    """

    name: str
    measure: str
    program: surgery.Program
    target: str
    quality: Callable[[OnnxModel], float]
    inputs: Callable[[int], dict[str, Tensor]]
    data: Sequence[tuple[tuple[Any, ...], dict[str, Tensor]]]
    up: bool = True
    rest: str = ""
    head: str = ""
    products: str = ""
    notes: tuple[str, ...] = field(default=())
    token: dict[str, Tensor] | None = None
    rounds: int = 7

    def loss(self, quality: float, reference: float) -> float:
        """Relative loss of quality, as a fraction of the reference's."""
        return (reference - quality) / reference if self.up else (quality - reference) / reference


def subjects(quick: bool) -> dict[str, Callable[[], Subject]]:
    found = {"digits": digits, "lee": lee, "film": film, "smollm2": language_model}
    return {"digits": lambda: digits(quick)} if quick else found


def film() -> Subject:
    """The demo's merged model: accuracy on held-out film sentences."""
    import film_sentiment
    from data import sentiment

    if not FILM.is_dir():
        raise MissingPeer(f"{FILM}, the model of the demo, is missing: run `make demo` first")
    merged = FILM.parent / "merged-hf"
    command = [sys.executable, "-m", "surgery", "merge", FILM, "--format", "hf", "--overwrite", "-o", merged]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    program = surgery.load(f"hf:{merged}", task="text-classification")
    reader = film_sentiment.Reader(minilm().path)
    split = sentiment("film")
    calibration = [((), _named(program, reader(split.train[i : i + 16]))) for i in range(0, 128, 16)]
    return Subject(
        "MiniLM, film",
        "accuracy",
        program,
        "attn.*,mlp.*",
        lambda file: film_sentiment.accuracy(file, reader, split.held_out),
        lambda rows: _named(program, reader(sorted(split.held_out, key=lambda s: len(s.text))[-rows:])),
        calibration,
        rest="embed.*",
        head="head",
    )


def lee() -> Subject:
    """MiniLM's sentence embeddings: correlation of cosine similarities with people's ratings."""
    from data import lee as documents_and_ratings
    from transformers import AutoTokenizer

    program = minilm().program()
    tokenizer = AutoTokenizer.from_pretrained(minilm().path)
    documents, ratings = documents_and_ratings()

    def read(texts: Sequence[str]) -> dict[str, Tensor]:
        given = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
        return _named(program, dict(given))

    def quality(file: OnnxModel) -> float:
        rows = []
        for start in range(0, len(documents), 10):
            inputs = read(documents[start : start + 10])
            hidden, mask = file.run(inputs)["last_hidden_state"], inputs["attention_mask"][..., None]
            rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        vectors = torch.cat(rows)
        upper = torch.triu_indices(len(documents), len(documents), 1)
        cosines = (vectors @ vectors.T)[upper[0], upper[1]]
        return float(torch.corrcoef(torch.stack([cosines, torch.tensor(ratings)[upper[0], upper[1]]]))[0, 1])

    from data import wiki

    texts = [paragraph[i : i + 500] for paragraph in wiki()[:8] for i in range(0, 2000, 500)]
    data = [((), read(texts[i : i + 8])) for i in range(0, 32, 8)]
    return Subject(
        "MiniLM, lee",
        "Pearson",
        program,
        "attn.*,mlp.*",
        quality,
        lambda rows: read(documents[:rows]),
        data,
        rest="embed.*",
        head="head",
    )


def language_model() -> Subject:
    """SmolLM2: perplexity of Wikipedia articles, in windows of 128 tokens."""
    from data import wiki
    from transformers import AutoTokenizer

    model = smollm2()
    program = model.program()
    tokenizer = AutoTokenizer.from_pretrained(model.path, gguf_file=model.kwargs["gguf_file"])
    ids = tokenizer("\n\n".join(wiki())[:200_000], return_tensors="pt")["input_ids"][0]
    windows = ids[: WINDOW * (WINDOWS + CALIBRATION)].reshape(-1, WINDOW)

    def given(rows: Tensor) -> dict[str, Tensor]:
        return _named(program, {"input_ids": rows, "attention_mask": torch.ones_like(rows)})

    def perplexity(file: OnnxModel) -> float:
        total = 0.0
        for row in windows[CALIBRATION:]:
            logits = file.run(given(row[None]))["logits"][0]
            total += float(F.cross_entropy(logits[:-1], row[1:]))
        return math.exp(total / WINDOWS)

    data = [((), given(windows[i : i + 2])) for i in range(0, CALIBRATION, 2)]
    return Subject(
        "SmolLM2, wiki",
        "perplexity",
        program,
        "attn.*,mlp.*",
        perplexity,
        lambda rows: given(windows[:rows, :32]),
        data,
        up=False,
        rest="embed.token",
        head="head",
        token=given(windows[:1, :1]),
        rounds=5,
        notes=("the weights come from a Q4_1 file, so 4-bit formats round them a second time",),
    )


def digits(quick: bool = False) -> Subject:
    """A small convolutional network on scikit-learn's digits, trained here."""
    require("sklearn", "the digits")
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    torch.manual_seed(0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, held = order[:1200], order[1200:]
    program = surgery.capture(_Digits(), (x[:2],)).apply(surgery.Full())
    module = program.module().train()
    optimiser = torch.optim.Adam(module.parameters(), lr=2e-3)
    for _ in range(12):
        for rows in learn[torch.randperm(len(learn))].split(50):
            optimiser.zero_grad()
            F.cross_entropy(module(x[rows]), y[rows]).backward()
            optimiser.step()
    module.eval()
    name = next(node.name for node in program.graph.nodes if node.op == "placeholder")

    def accuracy(file: OnnxModel) -> float:
        (logits,) = file.run({name: x[held]}).values()
        return float((logits.argmax(1) == y[held]).float().mean())

    data = [((x[learn[i : i + 32]],), {}) for i in range(0, 256, 32)]
    return Subject(
        "CNN, digits",
        "accuracy",
        program,
        "path:8,path:10",
        accuracy,
        lambda rows: {name: x[held[:rows]]},
        data,
        rest="conv",
        products="conv,path:8,path:10",
        rounds=3 if quick else 51,
    )


class _Digits(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


def _named(program: surgery.Program, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the program among a tokenizer's outputs."""
    _, kwargs = program.example_inputs
    return {name: given[name] for name in kwargs}
