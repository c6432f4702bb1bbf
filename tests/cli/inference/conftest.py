"""A tiny classifier in every form: trained by the command line, saved, merged, as a transformers directory, as ONNX."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from surgery.cli import main
from tests.train.conftest import bert_config, bert_folder, llama_folder, save_tokenizer, texts  # noqa: F401

WORDS = ("cat", "dog", "tree")
NAMES = ("neg", "neu", "pos")


def run(*args, code=0, stdin=""):
    """Run a command in this process; returns standard output, or standard error for another exit code than 0."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stopped,
        ):
            main([str(arg) for arg in args])
    finally:
        sys.stdin = before
    assert (stopped.value.code or 0) == code, out.getvalue() + err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()


def refused(*args):
    """The line of a command with wrong input, which must exit with code 2."""
    lines = [line for line in run(*args, code=2).splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def write_rows(path, count, seed, words=WORDS, names=NAMES):
    """Sentences of several lengths, of which the second word decides the label."""
    draw = random.Random(seed)
    with path.open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(["text", "label"])
        for _ in range(count):
            number = draw.randrange(len(words))
            more = " and says yes" * draw.randrange(4)
            out.writerow([f"the {words[number]} sees a red {draw.choice(words)}{more}", names[number]])
    return path


@dataclass(frozen=True)
class Forms:
    """Paths of one model. `printed` is what `surgery train --json` printed."""

    base: Path
    trained: Path
    hf: Path
    onnx: Path
    test: Path
    printed: dict


@pytest.fixture(scope="session")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    # Large weights and centred logits give predictions of every class, so that figures of all classes are tested.
    model = BertForSequenceClassification(bert_config(num_labels=3, initializer_range=0.4)).eval()
    save_tokenizer(folder / "base")
    data, test = write_rows(folder / "train.csv", 48, 0), write_rows(folder / "test.csv", 37, 1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [row["text"] for row in csv.DictReader(test.open())]
    with torch.no_grad():
        model.classifier.bias -= model(**tokenizer(rows, padding=True, return_tensors="pt")).logits.mean(0)
    model.save_pretrained(folder / "base")
    printed = run(
        "train", f"hf:{folder / 'base'}", "--objective", "classification", "--data", data, "--held-out", test,
        "--steps", 4, "--lr", "1e-3", "--evaluate", 2, "-o", folder / "trained", "--json",
    )  # fmt: skip
    onnx = folder / "onnx" / "model.onnx"
    onnx.parent.mkdir()
    save_tokenizer(onnx.parent)
    run("export", folder / "trained", "-o", onnx)
    run("merge", folder / "trained", "-o", folder / "hf", "--format", "hf")
    return Forms(folder / "base", folder / "trained", folder / "hf", onnx, test, json.loads(printed))
