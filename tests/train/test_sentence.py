"""Models of sentence-transformers from training to predictions, by the commands; the library judges the embeddings."""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import textwrap
import unittest
import zipfile

import numpy
import pytest
import torch

import surgery
from surgery.train.data_context import Setting
from surgery.train.texts import tokens
from surgery.train.tokenizers import find_tokenizer
from tests.conftest import minilm_path
from tests.shared import sentence
from tests.shared.commands import call
from tests.train.conftest import write

pytest.importorskip("sentence_transformers", reason="the sentence-transformers library judges these")
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

TASK = ("--task", "sentence-similarity")
# The same weights in the same ops; only batches of other widths differ in the order of their sums.
TOLERANCE = 2e-6


def documentation() -> list[dict[str, str]]:
    """Functions of Python's own library and the first lines of what they say about themselves: real pairs."""
    found = {}
    for module in (statistics, textwrap, zipfile, argparse, unittest, inspect, json):
        for name, value in vars(module).items():
            text = (inspect.getdoc(value) or "").split("\n\n")[0] if callable(value) else ""
            if len(text) > 20 and not name.startswith("_"):
                found[text] = {"anchor": name.replace("_", " "), "positive": " ".join(text.split())}
    return list(found.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """MiniLM of two layers as a sentence-transformers directory, with an adapter that the command has trained."""
    root = tmp_path_factory.mktemp("trained")
    pairs = documentation()
    assert len(pairs) > 80
    data = write(root / "pairs.jsonl", pairs)
    model = (f"hf:{minilm_path()}", *TASK, "--model-kwarg", "num_hidden_layers=2")
    code, text = call("apply", *model, "--pass", "lora", "--target", "attn.*", "-o", root / "adapted")
    assert code == 0, text
    options = ("--steps", 24, "--batch", 16, "--max-length", 24, "--lr", "1e-3", "--held-out", "0.3")
    code, text = call(
        "train", root / "adapted", "--objective", "contrastive", "--data", data, *options, "-o", root / "out"
    )
    assert code == 0, text
    code, merged = call("merge", root / "out", "--format", "hf", "-o", root / "merged")
    assert code == 0, merged
    assert "(a sentence-transformers directory)" in merged
    return root, text


def test_the_loss_falls_on_real_pairs(trained):
    _, text = trained
    line = next(line for line in text.splitlines() if line.startswith("held out: loss"))
    before, after = (
        float(part.split(",")[0]) for part in line.removeprefix("held out: loss ").split(" → ")[:2]
    )
    assert after < 0.9 * before, line


def test_predictions_are_the_librarys_embeddings(trained):
    root, _ = trained
    texts = ["mean of the data", "split a text into lines of a width, and join them again", "a"]
    wanted = sentence.opened(root / "merged").encode(texts)
    for model in (str(root / "merged"), f"hf:{root / 'merged'}", str(root / "out")):
        code, text = call("predict", model, *texts, "--json")
        assert code == 0, text
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        # The adapter beside its weight rounds apart from the merged weight.
        atol = 1e-5 if model.endswith("out") else TOLERANCE
        numpy.testing.assert_allclose([row["embedding"] for row in rows], wanted, rtol=0, atol=atol)
    call("export", f"hf:{root / 'merged'}", *TASK, "-o", root / "m.onnx")
    code, text = call("predict", root / "m.onnx", *texts, "--json", "--tokenizer", root / "merged")
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    numpy.testing.assert_allclose([row["embedding"] for row in rows], wanted, rtol=0, atol=TOLERANCE)


def test_evaluation_finds_partners(trained):
    root, _ = trained
    found = {}
    for model in (root / "merged", root / "out"):
        code, text = call("evaluate", model, "--data", root / "pairs.jsonl", "--json")
        assert code == 0, text
        assert "note: evaluates as contrastive" in text
        found[model.name] = json.loads(text[text.index("{") :])["metrics"]
    assert found["merged"]["accuracy"] == found["out"]["accuracy"] > 0.1  # chance: 0.006
    assert found["merged"]["loss"] == pytest.approx(found["out"]["loss"], rel=1e-4)


def test_texts_are_split_as_the_library_splits_them(tmp_path):
    """The longest text, the case and the prompt of the directory count in training and in predictions."""
    folder = sentence.write(
        tmp_path / "st", "bert", [Pooling(32, "mean"), Dense(32, 24), Normalize()],
        prompts={"query": "what is "}, default_prompt_name="query",
    )  # fmt: skip
    config = folder / "sentence_bert_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "max_seq_length": 9, "do_lower_case": True})
    )
    program, model = sentence.load(folder), sentence.opened(folder)
    setting = Setting.of(program, find_tokenizer(program))
    texts = [*sentence.TEXTS, "THE Old CAT"]
    for text in texts:
        row = tokens({"text": text}, Setting(**{**vars(setting), "columns": {"text": "text"}}))
        theirs = model.preprocess([text], prompt="what is ")
        assert row["input_ids"] == theirs["input_ids"][0].tolist(), text
        assert len(row["input_ids"]) <= 9
    code, text = call("predict", folder, *texts, "--json")
    assert code == 0, text
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    numpy.testing.assert_allclose(
        [row["embedding"] for row in rows], model.encode(texts), rtol=0, atol=TOLERANCE
    )
    assert torch.tensor(rows[0]["embedding"]).norm() == pytest.approx(1, abs=1e-5)


def test_where_the_weights_are_in_an_onnx_file_alone(tmp_path):
    folder = sentence.write(tmp_path / "st", "bert", [Pooling(32, "mean")])
    program = sentence.load(folder).apply(surgery.Quantize(target="mlp.*", format="int8"))
    program.write(tmp_path / "out", "onnx-sentence-transformers")
    code, text = call("predict", tmp_path / "out", "the cat")
    assert code == 2
    assert "has its weights in onnx/model.onnx alone" in text
    code, text = call("inspect", folder)
    assert code == 2
    assert "for a sentence-transformers model write hf:" in text
