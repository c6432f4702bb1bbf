"""Held-out figures of finished models: those of the training, scikit-learn's and transformers' own."""

from __future__ import annotations

import csv
import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForCausalLM,
)

import surgery
from tests.cli.inference.conftest import NAMES, refused, run, write_rows
from tests.train.conftest import bert_config, save_tokenizer, write
from tests.train.test_images import Net


def evaluated(*args):
    return json.loads(run("evaluate", *args, "--json"))


@pytest.fixture(scope="module")
def by_transformers(forms):
    """Actual and predicted classes of the test data, from transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(forms.hf).eval()
    tokenizer = AutoTokenizer.from_pretrained(forms.hf)
    rows = list(csv.DictReader(forms.test.open()))
    with torch.no_grad():
        said = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
    return [row["label"] for row in rows], [model.config.id2label[number] for number in said]


def test_the_figures_of_the_training(forms):
    found = evaluated(forms.trained, "--data", forms.test)
    # The same module runs on the same batches, so the figures are equal to the last bit.
    assert found["metrics"] == forms.printed["metrics"]
    assert found["rows"] == 37


def test_columns_are_named_with_and_without_an_objective(forms, tmp_path):
    rows = list(csv.DictReader(forms.test.open()))
    other = write(tmp_path / "other.jsonl", [{"Words": r["text"], "Mood": r["label"]} for r in rows])
    asked = evaluated(forms.trained, "--data", forms.test)["metrics"]
    named = ("--text", "Words", "--label", "Mood")
    assert evaluated(forms.trained, "--data", other, *named)["metrics"] == asked
    objective = ("--objective", "classification")
    assert evaluated(forms.trained, "--data", other, *objective, *named)["metrics"] == asked
    assert evaluated(forms.trained, "--data", other, *named, *objective)["metrics"] == asked
    said = refused("evaluate", forms.trained, "--data", other, "--label", "Mood")
    assert "no column looks like the text" in said
    assert "--text" in said
    assert "no column 'Mod'" in refused("evaluate", forms.trained, "--data", other, "--label", "Mod")


@pytest.mark.parametrize("form", ["trained", "hf", "onnx"])
def test_the_figures_of_scikit_learn(forms, by_transformers, form, tmp_path):
    actual, said = by_transformers
    assert set(said) == set(NAMES)  # otherwise figures of a class would be trivial
    path = tmp_path / "report.json"
    found = evaluated(getattr(forms, form), "--data", forms.test, "-o", path)
    assert json.loads(path.read_text()) == found
    assert found["confusion"] == metrics.confusion_matrix(actual, said, labels=NAMES).tolist()
    precision, recall, f1, support = metrics.precision_recall_fscore_support(actual, said, labels=NAMES)
    for number, each in enumerate(found["classes"]):
        assert each["name"] == NAMES[number]
        # Ratios of the same counts, of which sklearn computes F1 in another order: a few last bits.
        expected = (precision[number], recall[number], f1[number])
        assert (each["precision"], each["recall"], each["f1"]) == pytest.approx(expected, abs=1e-12)
        assert each["support"] == support[number]
    assert found["metrics"]["accuracy"] == pytest.approx(metrics.accuracy_score(actual, said), abs=1e-12)
    assert found["metrics"]["f1"] == pytest.approx(
        metrics.f1_score(actual, said, average="macro"), abs=1e-7
    )  # fp32
    # Another order of sums in fp32.
    assert found["metrics"]["loss"] == pytest.approx(forms.printed["metrics"]["loss"], rel=1e-5)


def test_a_table_with_names(forms):
    printed = run("evaluate", forms.hf, "--data", forms.test)
    assert printed.startswith("classification on 37 rows: loss ")
    assert "confusion matrix" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert [*NAMES] in lines
    assert all(sum(line[:1] == [name] for line in lines) >= 2 for name in NAMES)


def test_names_that_are_not_the_models(forms, tmp_path):
    other = write_rows(tmp_path / "other.csv", 9, 2, names=("good", "so-so", "bad"))
    assert "are neg, neu, pos, and the data has bad, good, so-so" in refused(
        "evaluate", forms.hf, "--data", other
    )
    # `bad` is the third class of the model. Sorted, it would be the first.
    renamed = ("evaluate", forms.hf, "--data", other, "--json", "--labels", "good,so-so,bad")
    own = write_rows(tmp_path / "own.csv", 9, 2)
    same = json.loads(run("evaluate", forms.hf, "--data", own, "--json"))
    assert json.loads(run(*renamed))["confusion"] == same["confusion"]
    assert "names 2 classes, but 'logits'" in refused(
        "evaluate", forms.hf, "--data", other, "--labels", "a,b"
    )
    # A model without names.
    assert "does not name its classes, and the data has neg, neu, pos" in refused(
        "evaluate", forms.base, "--data", own
    )


def test_regression(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config(num_labels=1)).eval()
    with torch.no_grad():
        model.classifier.weight.normal_()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    draw = np.random.default_rng(0)
    texts = [
        f"the {word} sees a {other}" for word in ("cat", "dog", "tree") for other in ("red", "is", "what")
    ]
    labels = draw.normal(size=len(texts)).tolist()
    data = write(tmp_path / "d.jsonl", [{"text": t, "score": v} for t, v in zip(texts, labels, strict=True)])
    found = evaluated(tmp_path / "model", "--data", data)
    assert found["objective"] == "regression"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        said = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    expected = {
        "loss": metrics.mean_squared_error(labels, said),
        "mae": metrics.mean_absolute_error(labels, said),
        "r2": metrics.r2_score(labels, said),
        "pearson": float(np.corrcoef(labels, said)[0, 1]),
    }
    # fp32 sums in batches instead of single rows.
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    rows = [json.loads(line) for line in run("predict", tmp_path / "model", data, "--json").splitlines()]
    assert [row["values"][0] for row in rows] == pytest.approx(said, rel=1e-4, abs=1e-6)


def test_language_modelling(llama_folder, texts):
    found = evaluated(llama_folder, "--data", texts, "--batch", 5)
    assert found["objective"] == "causal-lm"
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(llama_folder).eval(),
        AutoTokenizer.from_pretrained(llama_folder),
    )
    summed = terms = 0.0
    for line in texts.read_text().splitlines():
        ids = torch.tensor([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            summed += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        terms += ids.shape[1] - 1
    # Padded batches sum in another order.
    assert found["metrics"]["loss"] == pytest.approx(summed / terms, rel=1e-5)
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(summed / terms), rel=1e-5)


def test_figures_of_another_objective(bert_folder, llama_folder, tmp_path):
    rows = [
        {"anchor": f"the {a} is {b}", "positive": f"{b} is the {a}"}
        for a in ("cat", "dog")
        for b in ("red", "it")
    ]
    data = write(tmp_path / "d.jsonl", rows)
    found = evaluated(
        bert_folder, "--data", data, "--objective", "contrastive", "--loss", "infonce", "--temperature", "0.1"
    )
    assert set(found["metrics"]) == {"loss", "accuracy", "mrr"}
    assert "suggest no objective" in refused("evaluate", bert_folder, "--data", data)
    # An objective that needs the base beside the model.
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "the cat", "chosen": "is red", "rejected": "is it"}])
    assert "needs the program that surgery saved" in refused(
        "evaluate", llama_folder, "--data", pairs, "--objective", "dpo"
    )


def test_an_objective_with_a_teacher_needs_no_program(forms):
    """The teacher is the model itself, as a saved program: it agrees with every form."""
    options = ("--objective", "distill", "--teacher", forms.trained, "--of", "classification")
    found = evaluated(forms.onnx, "--data", forms.test, *options)["metrics"]
    assert found["agreement"] == 1
    assert found["accuracy"] == found["teacher/accuracy"] == forms.printed["metrics"]["accuracy"]
    assert found["soft"] == pytest.approx(0, abs=1e-6)  # fp32 of two runtimes


class Normalized(Net):
    """A network that says how its pixels are normalized, as timm's do."""

    pretrained_cfg: ClassVar = {"mean": (0.4,), "std": (0.2,)}


def test_images_and_their_normalization(tmp_path):
    """An ONNX file has the mean of the pixels in its metadata; a directory of PNGs by class is the data."""
    torch.manual_seed(0)
    net = Normalized()
    program = surgery.capture(net, (torch.rand(2, 1, 8, 8),), {"image": {0: "batch"}})
    path = tmp_path / "model.onnx"
    program.export(path)
    images, labels = load_digits(return_X_y=True)
    said, actual = [], labels[:40].tolist()
    for number, (pixels, label) in enumerate(zip(images[:40], actual, strict=True)):
        folder = tmp_path / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        gray = (pixels.reshape(8, 8) * 15).astype(np.uint8)
        Image.fromarray(gray).save(folder / f"{number:03}.png")
        with torch.no_grad():
            scaled = (torch.tensor(gray).float()[None, None] / 255 - 0.4) / 0.2
            said.append(int(net(scaled).argmax()))
    assert len(set(said)) > 1
    found = evaluated(path, "--data", tmp_path / "digits")
    expected = metrics.confusion_matrix(actual, said, labels=range(10)).tolist()
    assert found["confusion"] == expected
    lines = run("predict", path, *sorted((tmp_path / "digits" / "3").glob("*.png"))).splitlines()
    numbers = [i for i, label in enumerate(actual) if label == 3]
    assert [line.split("\t")[0] for line in lines] == [f"LABEL_{said[i]}" for i in numbers]
    assert "is no image" in refused("predict", path, "a text")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nothing", "--data", "TEST"), "nothing does not exist"),
        (("EMPTY", "--data", "TEST"), "holds no model"),
        (("HF", "--data", "no.csv"), "there is no such file"),
        (("HF", "--data", "TEST", "--objective", "clasification"), "did you mean 'classification'"),
        (("HF", "--data", "TEST", "--objective", "classification", "--label", "lable"), "no column 'lable'"),
        (("HF", "--data", "TEST", "--labels", "a,a,b"), "a name occurs twice"),
        (("HF", "--data", "TEST", "--adapter", "film"), "has no adapters to choose from"),
        (("ONNX", "--data", "TEST", "--adapter", "film"), "has no adapter 'film'"),
        (("ONNX", "--data", "TEST", "--tokenizer", "nowhere"), "--tokenizer nowhere cannot be read"),
        (("HF", "--data", "TEST", "--objective", "causal-lm"), "cannot be judged as causal-lm"),
        (("HF", "--data", "TEST", "-o", "TEST"), "exists; choose another -o"),
    ],
)
def test_wrong_input_is_one_line(forms, tmp_path, args, said):
    (tmp_path / "empty").mkdir()
    paths = {"HF": forms.hf, "ONNX": forms.onnx, "TEST": forms.test, "EMPTY": tmp_path / "empty"}
    assert said in refused("evaluate", *(paths.get(arg, arg) for arg in args))


def test_without_a_tokenizer(forms, tmp_path):
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(forms.onnx.read_bytes())
    assert "no tokenizer was found beside the model; name its directory with --tokenizer" in refused(
        "evaluate", alone, "--data", forms.test
    )
    assert evaluated(alone, "--data", forms.test, "--tokenizer", forms.base)["rows"] == 37
