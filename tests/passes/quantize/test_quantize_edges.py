"""Quantization edge cases.

Weights of zeros and of half precision, data of zeros or infinite, every kind of adapter, every format merged, and files
that onnxruntime converts to floats.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import ExportError, PassError
from surgery.engine.contract.observe import observe
from surgery.export.lowerings.dequantize import Weight, check_kept
from surgery.passes.quantize.codes import decode, encode
from tests.passes.quantize.test_quantize import randomise

FORMS = ["int8", "int4", "nf4", "ternary", "binary"]


class Block(nn.Module):
    """Two linear layers with a residual."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def block(width: int = 64, inner: int = 128, dtype: torch.dtype = torch.float32) -> surgery.Program:
    torch.manual_seed(0)
    return surgery.capture(Block(width, inner).eval().to(dtype), (torch.randn(4, width).to(dtype),))


@pytest.mark.parametrize("format", FORMS)
def test_rows_of_zeros_stay_zero(format):
    matrix = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    matrix[1] = 0
    found = encode(matrix, format, 64)
    given = decode(found.codes, found.scale, found.zero, format, 64)
    assert not given[1].any()
    assert given[0].any()
    program = block()
    with torch.no_grad():
        program.module().get_parameter("up.weight").zero_()
    rounded = program.apply(surgery.Quantize(target="path:up", format=format, group=0))
    assert observe(rounded.run(), program.run()).equal
    assert rounded.journal.entries[-1].sites[0].decided["error"] == 0


@pytest.mark.parametrize("format", FORMS)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2e-6)]
)
def test_what_is_said_of_half_precision_is_what_is_stored(format, dtype, size):
    """Codes are computed with the scales as the dtype stores them, also near its smallest number."""
    module = nn.Sequential(nn.Linear(64, 64)).eval().to(dtype)
    with torch.no_grad():
        module[0].weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * size)
    base = surgery.capture(module, (torch.randn(2, 64).to(dtype),))
    program = base.apply(surgery.Quantize(target="all", format=format))
    weight = module[0].weight.detach().double()
    own = {name.rpartition(".")[2]: tensor for name, tensor in program.tensors.items()}
    given = decode(own["codes"], own["scale"], None, format, 64)
    assert given.dtype == dtype
    real = float((weight - given.double()).norm() / weight.norm())
    said = program.journal.entries[-1].sites[0].decided["error"]
    # A product of code and scale is rounded to the dtype once more; a value near 2e-6 in steps of 6e-8.
    steps = 2.0 ** -(8 if dtype == torch.bfloat16 else 11) if size == 1 else 6e-8 / size
    assert abs(said - real) <= steps


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_data_that_says_nothing_or_too_much(format):
    base = block()
    gptq = surgery.Quantize(target="path:up", format=format, method="gptq")
    plan = base.plan(gptq, data=[((torch.zeros(4, 64),), {})])
    assert "its input is zero on all of the data, so no error can be measured; give data" in str(
        plan.passes[-1].refused[0].refusal
    )
    inputs = torch.randn(4, 64)
    noted = base.plan(gptq).passes[-1].accepted[0]
    assert "calibrated on the model's example inputs (give --data)" in gptq.outcome(noted.site).note
    noted = base.plan(gptq, data=[((inputs,), {})]).passes[-1].accepted[0]
    assert "example inputs" not in gptq.outcome(noted.site).note
    inputs[0, 0] = torch.inf
    with pytest.raises(PassError, match="the input 'x' contains inf or NaN; clean the data"):
        base.plan(gptq, data=[((inputs,), {})])
    huge = torch.full((4, 64), 3e38)
    with pytest.raises(PassError, match="contains inf or NaN; clean the data"):
        base.plan(surgery.Quantize(target="path:down", format=format, method="gptq"), data=[((huge,), {})])


@pytest.mark.parametrize(
    "given",
    [
        surgery.PruneFilters(target="path:up", importance="taylor"),
        surgery.SparseTune(target="path:up", by="gradient"),
    ],
    ids=["prune-filters", "sparse-tune"],
)
def test_data_for_gradients_is_checked_too(given):
    base = block()
    for data, said in (
        (torch.randn(4, 63), r"has shape \[4, 63\], and the model takes"),
        (torch.full((4, 64), torch.nan), "contains inf or NaN; clean the data"),
        (torch.ones(4, 64, dtype=torch.int64), "is torch.int64, and the model takes"),
        (
            torch.full((4, 64), 3e38),
            r"(gradient of \S+|program's output) contains inf or NaN; clean the data",
        ),
    ):
        with pytest.raises(PassError, match=said):
            base.apply(given, data=[((data,), {})])


def test_zeros_measure_no_error():
    """Nothing would be lost on them, whatever the codes."""
    program = randomise(
        block()
        .apply(surgery.Quantize(target="all", format="ternary"))
        .apply(surgery.Lora(target="path:up", rank=2))
    )
    with pytest.raises(PassError, match="its input is zero on all of the data, so no error can be measured"):
        program.merge(quantized="auto", data=[((torch.zeros(4, 64),), {})])


@pytest.mark.parametrize("options", [*({"format": f} for f in FORMS), {"format": "int4", "asymmetric": True},
                                     {"format": "int8-dynamic"}], ids=str)  # fmt: skip
def test_every_format_takes_an_adapter_in(options):
    """New codes encode the sum; the outputs move no more than the reported loss."""
    program = randomise(
        block()
        .apply(surgery.Quantize(target="all", **options))
        .apply(surgery.Lora(target="path:up", rank=4, alpha=64))
    )
    merged = program.merge(quantized="requantize")
    (choice,) = merged.journal.entries[-1].options["choices"].values()
    assert choice["how"] == "requantize"
    assert not any("lora" in name for name in merged.graph_module.code.split())
    moved = observe(program.run(), merged.run()).difference
    assert moved > 0
    limit = {"int8": 0.02, "int8-dynamic": 0.02, "int4": 0.2, "nf4": 0.2}.get(options["format"], 2.0)
    assert moved <= limit  # half a step of the codes, of weights in [-1/8, 1/8] and 64 inputs


def test_auto_chooses_for_each_site_by_itself():
    """New codes lose little of a large update; a small update stays a branch."""
    program = block().apply(surgery.Quantize(target="all", format="int4"))
    program = program.apply(surgery.Lora(target="path:up", rank=2, label="big"))
    program = program.apply(surgery.Lora(target="path:down", rank=2, label="small"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if "lora" in name:
                size = 0.3 if "big" in name else 0.003
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
    merged = program.merge(quantized="auto", budget=0.3)
    found = {path: choice["how"] for path, choice in merged.journal.entries[-1].options["choices"].items()}
    assert found == {"up": "requantize", "down": "keep"}


KINDS = {
    "pissa": surgery.Lora(target="path:up", rank=2, init="pissa"),
    "adapter": surgery.Adapter(target="path:down", placement="parallel", size=4),
    "side": surgery.Expand(target="path:up", side="dense", size=4),
    "sparse-tune": surgery.SparseTune(target="path:up", density=0.1),
    "head": surgery.Head(mode="add", labels=3, head_name="kind"),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_adapters_on_codes(name):
    """Gradients of what they add alone, and off again to the bit."""
    quantized = block().apply(surgery.Quantize(target="all", format="int4"))
    program = quantized.apply(KINDS[name], freeze_base=True)
    module = program.module().train()
    out = module(*program.example_inputs[0])
    sum(leaf.square().sum() for leaf in torch.utils._pytree.tree_leaves(out)).backward()
    trained = {n for n, p in module.named_parameters() if p.grad is not None}
    assert trained
    assert not any("quantize" in n or n in ("up.weight", "down.weight") for n in trained)
    module.eval()
    assert observe(program.undo(program.journal.entries[-1].id).run(), quantized.run()).equal


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_groups_are_fused(group, tmp_path):
    program = block(256, 256).apply(surgery.Quantize(target="all", format="int4", group=group))
    assert program.export(tmp_path / "model.onnx").parity.error <= 1e-5
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "fast.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    fused = [n for n in onnx.load(tmp_path / "fast.onnx").graph.node if n.op_type == "MatMulNBits"]
    assert [next(a.i for a in n.attribute if a.name == "block_size") for n in fused] == [group] * 2


def test_half_precision_in_onnx(tmp_path):
    """fp16 runs in onnxruntime; of bf16 it has no such op, and that is said in a line."""
    half = block(dtype=torch.float16)
    report = half.apply(surgery.Quantize(target="all", format="int8")).export(tmp_path / "half.onnx")
    assert report.parity.error <= 2e-2  # eleven bits, through sums of 128
    brain = block(dtype=torch.bfloat16)
    with pytest.raises(ExportError, match="onnxruntime"):
        brain.apply(surgery.Quantize(target="all", format="int8")).export(tmp_path / "brain.onnx")
    assert not (tmp_path / "brain.onnx").exists()


def test_a_weight_that_onnxruntime_folds_is_found(tmp_path):
    """Codes that are cast and multiplied, as no DequantizeLinear: constants to its optimiser."""
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["codes"], ["wide"], to=kinds.FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["weight"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "folds", [helper.make_tensor_value_info("x", kinds.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, [2, 4])],
        [onnx.numpy_helper.from_array(codes, "codes"), onnx.numpy_helper.from_array(np.float32(0.5), "scale")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "folds.onnx")
    weight = Weight(16, float(np.abs(codes * 0.5).sum()))
    with pytest.raises(ExportError, match="onnxruntime turns a quantized weight into floats"):
        check_kept(tmp_path / "folds.onnx", [weight])
    check_kept(tmp_path / "folds.onnx", [Weight(16, 1.0)])  # another weight
