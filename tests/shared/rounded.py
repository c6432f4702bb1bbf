"""Helpers for the options of int8-dynamic: round trips of a program and checks of its ONNX file."""

from __future__ import annotations

import collections

import onnx
import pytest
import torch
from torch import nn

import surgery
from surgery.engine.contract.observe import observe
from tests.conftest import minilm_path
from tests.passes.quantize.test_quantize import randomise
from tests.passes.quantize.test_requantize import merge_of
from tests.passes.quantize.test_smooth import DATA
from tests.passes.quantize.test_smooth_carried import adapter_error, floats_left, optimised


def check_carried(base, pass_, limit, path):
    """Saved, merged into new codes whose error is below the limit, and undone."""
    program = base.apply(pass_, data=DATA)
    program = randomise(program.apply(surgery.Lora(target="attn.q", rank=2)))
    program.save(path)
    assert observe(surgery.load(str(path)).run(), program.run()).equal
    merged = program.merge(quantized="requantize", data=DATA)
    assert not any("lora" in str(node.target) for node in merged.graph.nodes if node.op == "get_attr")
    for name, choice in merge_of(merged).options["choices"].items():
        assert choice["errors"]["requantize"] < limit, choice["errors"]
        if "layers.0" in name:  # what enters it no other site has moved
            moved = adapter_error(program, merged, name, DATA)
            assert choice["errors"]["requantize"] == pytest.approx(moved, rel=1e-3, abs=1e-6)
    assert observe(merged.undo_all().run(), base.run()).equal


def check_fused(pass_, path, error, products):
    """Check MiniLM's first two layers in a file: this many integer products in onnxruntime, no weight in floats.

    Returns the number of each op in the file.
    """
    torch.manual_seed(0)
    given = {"num_labels": 2, "num_hidden_layers": 2}
    encoder = surgery.load(f"hf:{minilm_path()}", task="text-classification", model_kwargs=given)
    program = randomise(encoder.apply(pass_).apply(surgery.Lora(target="attn.q", rank=2)))
    report = program.export(path)
    assert report.parity.error <= error
    assert {name for name in program.tensors if ".quantize." in name} <= set(report.stored)
    graph = optimised(path)
    ops = collections.Counter(node.op_type for node in graph.node)
    assert (ops["MatMulIntegerToFloat"], ops["DynamicQuantizeMatMul"], ops["MatMulNBits"]) == (products, 0, 0)
    assert floats_left(graph) == ["bert.pooler.dense.weight"]  # no target
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def error_under_an_adapter(dora, path, **options):
    """Parity error of a file with one int8-dynamic layer under LoRA or DoRA."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 40)).eval()
    base = surgery.capture(module, (torch.randint(0, 40, (3, 7)),))
    program = base.apply(surgery.Quantize(target="1", format="int8-dynamic", **options))
    program = randomise(program.apply(surgery.Lora(target="1", rank=2, dora=dora)))
    return program.export(path).parity.error
