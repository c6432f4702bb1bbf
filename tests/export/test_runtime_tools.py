"""onnxruntime's own tools on exported files: checker, shape inference, quantization, optimizer, conversions."""

from __future__ import annotations

import collections
import logging

import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.float16 import convert_float_to_float16

import surgery
from tests.passes.quantize.test_smooth_carried import optimised
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.zoo import module

pytest.importorskip("sympy")
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


def opens(path):
    """The file loads in a default session."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_tools(path, folder):
    """Run the tools on a file. Returns the ops of the optimizer's result."""
    onnx.checker.check_model(str(path), full_check=True)
    SymbolicShapeInference.infer_shapes(onnx.load(path), auto_merge=False, guess_output_rank=False, verbose=0)
    quant_pre_process(str(path), str(folder / "prepared.onnx"))
    quantize_dynamic(str(folder / "prepared.onnx"), str(folder / "dynamic.onnx"))
    onnx.save(convert_float_to_float16(onnx.load(path)), folder / "half.onnx")
    blocks = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=True)
    blocks.process()
    blocks.model.save_model_to_file(str(folder / "blocks.onnx"))
    for name in ("prepared", "dynamic", "half", "blocks"):
        opens(folder / f"{name}.onnx")
    found = optimizer.optimize_model(str(path), model_type="bert", num_heads=4, hidden_size=32, opt_level=0)
    return collections.Counter(node.op_type for node in found.model.graph.node)


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
    onnx.checker.check_model(str(path), full_check=True)
    SymbolicShapeInference.infer_shapes(onnx.load(path), auto_merge=False, guess_output_rank=False, verbose=0)
    quant_pre_process(str(path), str(tmp_path / "prepared.onnx"))
    opens(tmp_path / "prepared.onnx")
    ops = optimizer.optimize_model(str(path), model_type="bert", num_heads=4, hidden_size=32, opt_level=0)
    assert sum(node.op_type == "SkipLayerNormalization" for node in ops.model.graph.node) == SKIPS["bert"]
