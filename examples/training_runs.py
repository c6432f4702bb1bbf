"""Train programs with `surgery train` on real data, one run for each of several objectives.

    python examples/training_runs.py                      all runs
    python examples/training_runs.py distill --quick      one run with little data, as a test

The data is written as JSONL under --out. Every command is printed as one would type it, with its metrics on held-out
data.

    classification   MiniLM learns to classify film sentences as positive or negative
    multi-task       four heads on MiniLM, one for each source of sentences, compared with four single-task models
    distill          three layers of MiniLM learn from the six of `classification`, compared with labels alone
    contrastive      MiniLM learns which answer belongs to which instruction; lee's ratings before and after
    fashion          a small network learns vectors of Fashion-MNIST images, without labels (SimCLR) and with labels
    tweets           SmolLM2 continues training on tweets (LoRA); its perplexity on tweets and on Wikipedia
    alpaca           SmolLM2 learns to answer instructions (LoRA); the loss of held-out answers

examples/rl_runs.py has the runs that learn from preferences and rewards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from data import DOMAINS, alpaca_en, lee, sentences, sentiment, wiki
from fashion import fashion
from PIL import Image
from runs import MINILM, MINILM_FOLDER, Runs, main, smollm2, words
from torch.nn import functional as F
from transformers import AutoTokenizer

import surgery


def domain(runs: Runs, name: str, most: int) -> Path:
    """Write positive and negative sentences of a domain as JSONL, at most `most`."""
    found = sentiment(name)
    rows = [{"text": s.text, "label": s.label} for s in (*found.train, *found.held_out)]
    return runs.write(f"{name}-{most}", rows[:most])


SENTENCES = 1600
OF_EACH_TASK = 720
CLASSIFIER = ("--task", "text-classification", "--model-kwarg", "num_labels=2")
SHORT = ("--max-length", "48", "--lr", "1e-4", "--held-out", "0.2", "--epochs")


def classification(runs: Runs) -> Path:
    data = domain(runs, "film", SENTENCES)
    model = runs.apply(MINILM, "classifier", *CLASSIFIER, "--pass", "full")
    runs.train(
        model, "film", "--objective", "classification", "--data", data, *SHORT, 2, show=["accuracy", "f1"]
    )
    return runs.out / "film"


def multi_task(runs: Runs) -> None:
    files = {name: domain(runs, name, OF_EACH_TASK) for name in DOMAINS}
    heads = [
        word
        for name in files
        for word in words(f"--pass head --mode add --head-name {name} --labels 2 --pool mean")
    ]
    model = runs.apply(MINILM, "heads", *heads, "--pass", "full")
    tasks = [word for name in files for word in ("--task", f"{name}=classification")]
    data = [word for name, path in files.items() for word in ("--data", f"{name}={path}")]
    runs.train(
        model, "tasks", "--objective", "multi-task", *tasks, "--temperature", "2", *data, *SHORT, 1,
        show=["score", *(f"{name}/accuracy" for name in files)],
    )  # fmt: skip
    one = runs.apply(MINILM, "classifier", *CLASSIFIER, "--pass", "full")
    for name, path in files.items():
        runs.train(
            one, f"{name} alone", "--objective", "classification", "--data", path, *SHORT, 1, show=["accuracy"]
        )  # fmt: skip


def distill(runs: Runs) -> None:
    teacher = runs.out / "film"
    if not teacher.is_dir():
        classification(runs)
    data = domain(runs, "film", SENTENCES)
    student = runs.apply(
        MINILM, "student", *CLASSIFIER, "--model-kwarg", "num_hidden_layers=3", "--pass", "full"
    )
    alone = ("--objective", "classification", "--data", data, *SHORT, 2)
    runs.train(student, "labels alone", *alone, show=["accuracy"])
    taught = ("--objective", "distill", "--teacher", teacher, "--alpha", "0.7", "--temperature", "2")
    hints = ("--hint", "bert.encoder.layer.2=bert.encoder.layer.5", "--hint-weight", "0.1")
    shown = words("accuracy agreement teacher/accuracy")
    runs.train(student, "taught", *taught, "--data", data, *SHORT, 2, show=shown)
    runs.train(student, "hinted", *taught, *hints, "--data", data, *SHORT, 2, show=[*shown, "hints"])


def contrastive(runs: Runs) -> None:
    rows = [{"anchor": row.prompt, "positive": row.answer} for row in alpaca_en()]
    data = runs.write("pairs", rows)
    model = runs.apply(MINILM, "encoder", "--pass", "full")
    runs.say(f"Pearson with lee's ratings: {pearson(model):.3f}")
    runs.train(
        model, "pairs", "--objective", "contrastive", "--temperature", "0.05", "--data", data, "--epochs", "1",
        "--batch", "32", "--lr", "5e-5", "--max-length", "64", "--held-out", "0.2", show=["loss", "accuracy", "mrr"],
    )  # fmt: skip
    runs.say(f"Pearson with lee's ratings: {pearson(runs.out / 'pairs'):.3f}")


@torch.no_grad()
def pearson(folder: Path) -> float:
    """Pearson correlation between cosine similarities of documents and people's ratings."""
    documents, ratings = lee()
    program = surgery.load(str(folder))
    read = AutoTokenizer.from_pretrained(MINILM_FOLDER)
    inputs = dict(read(documents, padding=True, truncation=True, max_length=128, return_tensors="pt"))
    seen = inputs["attention_mask"].unsqueeze(-1)
    states = program.run(**inputs)["last_hidden_state"]
    found = F.normalize((states * seen).sum(1) / seen.sum(1), dim=-1)
    cosines, wanted = found @ found.T, torch.tensor(ratings)
    upper = torch.ones_like(wanted, dtype=torch.bool).triu(1)
    return float(torch.corrcoef(torch.stack([cosines[upper], wanted.float()[upper]]))[0, 1])


def clothes(runs: Runs) -> None:
    images, labels = fashion()
    chosen = slice(0, min(6_000, runs.most))
    data = runs.out / "fashion.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    pictures = [Image.fromarray(image) for image in images[chosen].numpy()]
    rows = {"image": pictures, "label": labels[chosen].tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(data)
    options = ["--data", data, "--base", CLOTHES, "--batch", "128", "--lr", "1e-3", "--held-out", "0.1"]
    graft = words("--pass head --mode add --init kaiming")
    model = runs.apply(CLOTHES, "clothes", *graft, "--head-name", "proj", "--labels", "64", "--pass", "full")
    runs.say(f"precision of the ten nearest, untrained: {precision(model):.3f}")
    own = words("--objective contrastive --loss simclr --vector logits_proj --temperature 0.2")
    runs.train(model, "views", *own, *options, "--epochs", "8", show=["loss", "accuracy", "mrr"])
    runs.say(f"precision of the ten nearest: {precision(runs.out / 'views'):.3f}")
    model = runs.apply(CLOTHES, "classes", *graft, "--head-name", "kind", "--labels", "10", "--pass", "full")
    own = words("--objective classification --output logits_kind")
    runs.train(model, "kinds", *own, *options, "--epochs", "4", show=["accuracy"])
    runs.say(f"precision of the ten nearest: {precision(runs.out / 'kinds'):.3f}")


CLOTHES = "py:fashion:encoder"


@torch.no_grad()
def precision(folder: Path) -> float:
    """Precision at ten on 2,000 held-out images: share of the ten nearest images that have the same class."""
    images, labels = (part[:2000] for part in fashion(train=False))
    program = surgery.load(str(folder), base=surgery.load(CLOTHES))
    vectors = F.normalize(program.run(images.unsqueeze(1).float() / 255)["output"], dim=1)
    nearest = (vectors @ vectors.T).fill_diagonal_(-1).topk(10).indices
    return float((labels[nearest] == labels.unsqueeze(1)).double().mean())


LORA = ("--pass", "lora", "--target", "attn.*,mlp.*", "--rank", "8")


def smollm2_with_lora(runs: Runs) -> Path:
    reference, *kind = smollm2(runs.out)
    return runs.apply(reference, "smollm2", *kind, *LORA)


def tweets(runs: Runs) -> None:
    texts = [s.text for s in sentences("tweets")]
    random.Random(0).shuffle(texts)
    learn = runs.write("tweets-train", [{"text": text} for text in texts[120:620]])
    held = runs.write("tweets-held-out", [{"text": text} for text in texts[:120]])
    other = [text[:800] for text in wiki()[:10]]
    model = smollm2_with_lora(runs)
    own = words("--objective causal-lm --epochs 1 --max-length 128 --lr 3e-4")
    runs.train(model, "tweeting", *own, "--data", learn, "--held-out", held, show=["perplexity"])
    program, read = (
        surgery.load(str(runs.out / "tweeting")),
        AutoTokenizer.from_pretrained(runs.out / "SmolLM2"),
    )
    before, after = (perplexity(each, read, other) for each in (program.without("lora"), program))
    runs.say(f"perplexity of Wikipedia, before and after: {before:.2f} → {after:.2f}")


@torch.no_grad()
def perplexity(program: surgery.Program, read: Any, texts: list[str]) -> float:
    """Perplexity of all tokens except the first of each text."""
    lost, count = 0.0, 0
    for text in texts:
        ids = read(text, return_tensors="pt")["input_ids"]
        logits = program.run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        lost += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(lost / count)


def alpaca(runs: Runs) -> None:
    data = runs.write("alpaca", [{"prompt": row.prompt, "response": row.answer} for row in alpaca_en()[:210]])
    model = smollm2_with_lora(runs)
    own = words("--objective sft --epochs 1 --max-length 192 --lr 3e-4 --held-out 0.1")
    runs.train(model, "answering", *own, "--data", data, show=["loss", "perplexity"])


RUNS: dict[str, Callable[[Runs], Any]] = {
    "classification": classification,
    "multi-task": multi_task,
    "distill": distill,
    "contrastive": contrastive,
    "fashion": clothes,
    "tweets": tweets,
    "alpaca": alpaca,
}


if __name__ == "__main__":
    main(RUNS, __doc__)
