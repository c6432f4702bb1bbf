"""Predictions: labels and probabilities, numbers, embeddings; texts, files and pipes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.inference.conftest import refused, run

TEXT = "the cat sees a red dog"


@pytest.fixture(scope="module")
def expected(forms):
    """Probabilities of every text of the test data, one at a time, by transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(forms.hf).eval()
    tokenizer = AutoTokenizer.from_pretrained(forms.hf)
    texts = [row["text"] for row in csv.DictReader(forms.test.open())]
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0] for text in texts]
    return texts, torch.stack(rows), [model.config.id2label[i] for i in range(3)]


@pytest.mark.parametrize("form", ["trained", "hf", "onnx"])
def test_every_form_predicts_as_transformers_does(forms, expected, form):
    """37 texts of several lengths in batches of 4: the order is that of the file."""
    texts, probabilities, names = expected
    printed = run("predict", getattr(forms, form), forms.test, "--json", "--top", 3, "--batch", 4)
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["input"] for row in rows] == texts
    for row, own in zip(rows, probabilities, strict=True):
        assert row["label"] == names[int(own.argmax())] == row["top"][0]["label"]
        said = {each["label"]: each["probability"] for each in row["top"]}
        # fp32 sums in padded batches, in onnxruntime, and with merged adapters.
        assert [said[name] for name in names] == pytest.approx(own.tolist(), abs=1e-5)


def test_a_pipe_gets_one_row_a_line(forms):
    line = run("predict", forms.hf, TEXT).rstrip("\n")
    label, probability, text = line.split("\t")
    assert (label, text) == (json.loads(run("predict", forms.hf, TEXT, "--json"))["label"], TEXT)
    assert 1 / 3 <= float(probability) <= 1
    # Lines of the standard input, beside texts, in their order.
    lines = run("predict", forms.hf, "-", "what is it", stdin=f"{TEXT}\n\nthe dog\n").splitlines()
    assert [each.split("\t")[2] for each in lines] == [TEXT, "the dog", "what is it"]
    assert lines[0] == line


def test_files_of_records(forms, tmp_path):
    run("predict", forms.hf, forms.test, "-o", tmp_path / "p.jsonl")
    run("predict", forms.hf, forms.test, "-o", tmp_path / "p.csv")
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [r["label"] for r in records] == [r["label"] for r in table]
    assert [r["input"] for r in records] == [r["input"] for r in csv_rows(forms.test)]
    assert "exists; choose another -o" in refused("predict", forms.hf, TEXT, "-o", tmp_path / "p.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.jsonl"]


def csv_rows(path):
    return [{"input": row["text"]} for row in csv.DictReader(path.open())]


def test_embeddings(bert_folder, tmp_path):
    texts = [TEXT, "it is green", "the tree"]
    model, tokenizer = (
        AutoModel.from_pretrained(bert_folder).eval(),
        AutoTokenizer.from_pretrained(bert_folder),
    )
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    run("predict", bert_folder, *texts, "-o", tmp_path / "e.npy")
    found = np.load(tmp_path / "e.npy")
    # The mean over tokens without padding.
    np.testing.assert_allclose(found, torch.stack([s.mean(0) for s in states]).numpy(), atol=1e-6)
    run("predict", bert_folder, *texts, "--pooling", "cls", "-o", tmp_path / "e.safetensors")
    first = load_file(tmp_path / "e.safetensors")["embedding"]
    np.testing.assert_allclose(first, torch.stack([s[0] for s in states]).numpy(), atol=1e-6)
    row = json.loads(run("predict", bert_folder, TEXT, "--json"))
    np.testing.assert_allclose(row["embedding"], found[0], atol=1e-6)


def test_arrays_by_input_name(forms, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(forms.hf)
    made = tokenizer([TEXT, "it is"], padding=True, return_tensors="np")
    arrays = {name: made[name] for name in ("input_ids", "attention_mask")}
    arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
    save_file(arrays, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **arrays)
    lines = [run("predict", forms.onnx, tmp_path / name).splitlines() for name in ("a.safetensors", "a.npz")]
    by_text = run("predict", forms.onnx, TEXT, "it is").splitlines()
    for own in lines:
        assert [line.split("\t")[:2] for line in own] == [line.split("\t")[:2] for line in by_text]
    save_file({"input_ids": made["input_ids"]}, tmp_path / "b.safetensors")
    assert "lacks the input" in refused("predict", forms.onnx, tmp_path / "b.safetensors")
    assert "give it alone" in refused("predict", forms.onnx, tmp_path / "a.npz", TEXT)


def test_a_language_model_is_for_generation(llama_folder):
    assert "use `surgery generate`" in refused("predict", llama_folder, TEXT)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("rows.csv",), "rows.csv does not exist"),
        ((TEXT, "--output-name", "logit"), "did you mean 'logits'"),
        ((TEXT, "-o", "p.pkl"), "are written as"),
        (("TEST", "--text", "txt"), "has no column 'txt'; did you mean 'text'"),
        ((TEXT, "--labels", "a,b"), "names 2 classes"),
        (("cat.png",), "cat.png does not exist"),
        (("EMPTY",), "holds no images and no rows"),
        ((TEXT, "--device", "cuda:99"), "here"),
    ],
)
def test_wrong_input_is_one_line(forms, tmp_path, args, said):
    paths = {"TEST": forms.test, "EMPTY": tmp_path}
    assert said in refused("predict", forms.hf, *(paths.get(arg, arg) for arg in args))


def test_a_device_is_for_torch_alone(forms):
    said = refused("predict", forms.onnx, TEXT, "--device", "meta")
    assert "runs in onnxruntime on the CPU" in said


def test_a_model_that_does_not_exist_is_reported_before_torch_is_imported():
    code = (
        "import sys; from surgery.cli import main\n"
        "try: main()\nexcept SystemExit as stopped: print(stopped.code, 'torch' in sys.modules)"
    )
    for args in (("predict", "no-such", "a text"), ("evaluate", "no-such", "--data", "no.csv")):
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=Path(__file__).parents[3]
        )
        assert done.stdout.split() == ["2", "False"]
        assert done.stderr.count("\n") == 1
