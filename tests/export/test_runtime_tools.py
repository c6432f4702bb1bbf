"""onnxruntime's own tools and onnxslim on exported files; `python -m tests.zoo.runtime_tools` covers the whole zoo."""

from __future__ import annotations

import logging

import pytest
import torch

import surgery
from tests.passes.quantize.test_smooth_carried import optimised
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.runtime_tools import check_tools
from tests.zoo.zoo import module

# Norms that `onnxruntime.transformers.optimizer` fuses with the sum before them: in these models two for each layer,
# except for the first of a model that norms before its layers. torch.onnx's own files give the same numbers.
SKIPS = {"bert": 4, "gpt2": 4}
SEVERAL = (
    "roberta", "distilbert", "electra", "albert", "deit", "vit", "opt", "gpt_neox", "llama", "bart", "t5", "swin",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The tools write temporary files into the current folder."""
    monkeypatch.chdir(tmp_path)


def program_of(name, folder):
    torch.manual_seed(0)
    module(name).save_pretrained(folder / "base")
    return surgery.load(f"hf:{folder / 'base'}", task=ARCHITECTURES[name].task)


@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_tools_and_fusions(name, tmp_path, caplog):
    path = tmp_path / "model.onnx"
    program_of(name, tmp_path).export(path)
    with caplog.at_level(logging.WARNING):
        ops = check_tools(path, tmp_path)
    assert ops["SkipLayerNormalization"] == SKIPS[name]
    assert "producer" not in caplog.text
    # A session on a CPU leaves the sums apart, which is faster: see surgery.export.unfused_sums.
    assert "SkipLayerNormalization" not in [node.op_type for node in optimised(path).node]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_tools_on_several(name, tmp_path):
    path = tmp_path / "model.onnx"
    program_of(name, tmp_path).export(path)
    check_tools(path, tmp_path)


@pytest.mark.parametrize(
    "pass_",
    [
        pytest.param(surgery.Lora(target="attn.*"), marks=pytest.mark.slow),
        pytest.param(surgery.Quantize(target="attn.*,mlp.*", format="int8"), marks=pytest.mark.slow),
        pytest.param(surgery.Quantize(target="attn.*,mlp.*", format="int8-dynamic"), marks=pytest.mark.slow),
    ],
    ids=lambda pass_: pass_.name,
)
def test_tools_on_adapted_and_quantized(pass_, tmp_path):
    path = tmp_path / "model.onnx"
    program_of("bert", tmp_path).apply(pass_).export(path, tolerance=1.0)
    ops = check_tools(path, tmp_path, floats=pass_.name == "lora")
    assert ops["SkipLayerNormalization"] == SKIPS["bert"]
