"""Smoothed and unquantized activations: saved, undone, merged into, exported, checked by the kit, refused."""

from __future__ import annotations

import collections

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import surgery
from surgery.api import PassError, Probe
from surgery.cli import main
from surgery.engine.contract.observe import observe
from surgery.graph.marks import output_with_adapters
from surgery.passes.quantize.codes import decode, encode
from surgery.testing import check_pass
from tests.conftest import minilm_path
from tests.passes.quantize.test_quantize import KIT, randomise
from tests.passes.quantize.test_requantize import merge_of
from tests.passes.quantize.test_smooth import DATA, SMOOTH, outlying, own_tensors, sites_of


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return outlying(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    given = {"num_labels": 2, "num_hidden_layers": 2}
    return surgery.load(f"hf:{minilm_path()}", task="text-classification", model_kwargs=given)


@pytest.mark.parametrize("budget", [None, 0.01])
def test_saved_loaded_without_measuring_and_undone(budget, encoder, tmp_path, monkeypatch):
    passed = surgery.Quantize(**SMOOTH, activation_budget=budget)
    program = randomise(encoder.apply(passed, surgery.Lora(target="attn.*", rank=2)))
    kept = [record for _, record in sites_of(program) if record.decided.get("kept")]
    assert bool(kept) is (budget is not None)
    program.save(tmp_path / "saved")

    def measured(*_, **__):
        raise AssertionError("loading measures")

    for place in (
        "engine.probe.Probe.watch",
        "engine.probe.Probe.largest",
        "passes.quantize.smoothing.factors",
    ):
        monkeypatch.setattr(f"surgery.{place}", measured)
    again = surgery.load(str(tmp_path / "saved"))
    assert observe(again.run(), program.run()).equal
    assert observe(again.undo_all().run(), encoder.run()).equal
    assert observe(again.undo("quantize").undo("lora").run(), encoder.run()).equal


def test_a_live_model_computes_the_same(encoder):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm_path(), num_labels=2, num_hidden_layers=2
    ).eval()
    model.load_state_dict(encoder.module().state_dict(), strict=False)
    _, given = encoder.example_inputs
    surgery.apply_(model, surgery.Quantize(**SMOOTH, activation_budget=0.03), data=[((), given)])
    program = encoder.apply(surgery.Quantize(**SMOOTH, activation_budget=0.03))
    torch.testing.assert_close(model(**given).logits, program.run()["logits"], rtol=1e-5, atol=1e-5)


def adapter_error(program, merged, path, data):
    """Error of a merge, by running the op before and after it."""
    outputs = []
    for each in (program, merged):
        site = next(s for s in each.sites if s.path == path)
        node = output_with_adapters(site.calls[0].node)
        outputs.append(torch.cat([v.double().flatten() for v in Probe(each, data).values([node])[node.name]]))
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())


@pytest.mark.parametrize("how", ["requantize", "residual"])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_an_adapter_goes_into_the_codes_of_the_smoothed_weight(method, how, planted, tmp_path):
    """With quantized and with unquantized inputs; the stored factors stay."""
    program = planted.apply(surgery.Quantize(**SMOOTH, method=method, activation_budget=0.02), data=DATA)
    program = randomise(program.apply(surgery.Lora(target="attn.q,mlp.down", rank=4)))
    kinds = {r.path.rpartition(".")[2]: r.decided["kept"] for _, r in sites_of(program)}
    merged = program.merge(quantized=how, data=DATA)
    choices = merge_of(merged).options["choices"]
    assert len(choices) == 4
    records = {record.path: record for _, record in sites_of(merged)}
    for site, before in sites_of(program):
        if before.path not in choices:
            continue
        choice, own = choices[before.path], own_tensors(merged, records[before.path])
        assert choice["how"] == how
        if before.path.endswith("layers.0.self_attn.q_proj"):  # what enters it no other site has moved
            assert choice["errors"][how] == pytest.approx(
                adapter_error(program, merged, before.path, DATA), rel=1e-3, abs=1e-6
            )
        if before.decided["kept"]:
            continue
        assert records[before.path].tensors["smooth"] == before.tensors["smooth"]
        if (how, method) == ("requantize", "nearest"):
            prefix = f"{before.path}.lora"
            update = program.tensors[f"{prefix}.B"] @ program.tensors[f"{prefix}.A"] * (16 / 4)
            wanted = (Probe(program).stored(site) + update.detach()) * own["smooth"]
            order = torch.arange(site.in_features)
            codes = encode(wanted, "int8", site.in_features, pairs=order).codes
            assert float((codes != own["codes"]).float().mean()) < 1e-3  # a sum in another order, at a tie
    assert kinds["q_proj"] is False
    merged.save(tmp_path / "merged")
    assert observe(surgery.load(str(tmp_path / "merged")).run(), merged.run()).equal
    assert observe(merged.undo("merge").run(), program.run()).equal
    assert observe(merged.undo_all().run(), planted.run()).equal


# -- in ONNX


def optimised(path):
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(path.with_name("fast.onnx"))
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return onnx.load(path.with_name("fast.onnx")).graph


def floats_left(graph):
    """Weights of MiniLM's linear layers that a graph has in floats."""
    sizes = {(384, 384), (384, 1536), (1536, 384)}
    return [t.name for t in graph.initializer if t.data_type == 1 and tuple(t.dims) in sizes]


def test_fused_by_onnxruntime(encoder, tmp_path):
    """One product with reciprocals, one rounding per input, no float weight; an unquantized input gives MatMulNBits."""
    passed = surgery.Quantize(**SMOOTH, activation_budget=0.03)
    program = encoder.apply(passed)
    kept = sum(record.decided["kept"] for _, record in sites_of(program))
    assert kept == 2
    report = program.export(tmp_path / "model.onnx")
    assert report.parity.error <= 3e-2  # a value between two levels may go either way
    assert {name for name in program.tensors if ".quantize." in name} <= set(report.stored)
    written = collections.Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert written["DynamicQuantizeLinear"] == 2 * 3
    assert written["MatMulInteger"] == 12 - kept
    encoder.apply(surgery.Quantize(**{**SMOOTH, "smooth": 0})).export(tmp_path / "plain.onnx")
    there = collections.Counter(node.op_type for node in onnx.load(tmp_path / "plain.onnx").graph.node)
    assert written["Reciprocal"] - there["Reciprocal"] == 2 * 3
    assert written["Div"] == there["Div"]
    graph = optimised(tmp_path / "model.onnx")
    ops = collections.Counter(node.op_type for node in graph.node)
    assert (ops["MatMulIntegerToFloat"], ops["DynamicQuantizeMatMul"], ops["MatMulNBits"]) == (6, 4, kept)
    assert floats_left(graph) == ["bert.pooler.dense.weight"]  # no target
    _, given = encoder.example_inputs
    fast = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = fast.run(["logits"], {name: t.numpy() for name, t in given.items()})
    assert float((torch.tensor(logits) - program.run()["logits"]).abs().max()) <= 3e-2


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_exported_under_adapters(adapter, planted, tmp_path):
    """DoRA reads the weight itself: it is exported in floats, divided by the factors; LoRA keeps the integers."""
    program = planted.apply(surgery.Quantize(**SMOOTH), data=DATA)
    program = randomise(program.apply(surgery.Lora(target="attn.q,mlp.down", rank=2, dora=adapter == "dora")))
    report = program.export(tmp_path / "model.onnx")
    assert report.parity.error <= 3e-2
    ops = collections.Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert ops["MatMulInteger"] == (14 if adapter == "lora" else 10)


class Rows(nn.Module):
    """Transposed weights, as in GPT-2: x W and addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(64, 48) / 8)
        self.weight, self.bias = nn.Parameter(torch.randn(48, 32) / 8), nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, torch.tanh(x @ self.plain), self.weight)


def test_weights_stored_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 64) * torch.logspace(-1, 1, 64)
    base = surgery.capture(Rows().eval(), (x,))
    program = base.apply(surgery.Quantize(target="all", format="int8-dynamic", smooth=0.65))
    plain = base.apply(surgery.Quantize(target="all", format="int8-dynamic"))
    assert observe(base.run(), program.run()).difference < observe(base.run(), plain.run()).difference
    (first, record), _ = sites_of(program)
    own = own_tensors(program, record)
    given = decode(own["codes"], own["scale"], None, "int8", 64) / own["smooth"]
    torch.testing.assert_close(Probe(program).stored(first), given.T)
    assert program.export(tmp_path / "model.onnx").parity.error <= 3e-2
    ops = collections.Counter(node.op_type for node in optimised(tmp_path / "model.onnx").node)
    assert ops["DynamicQuantizeMatMul"] + ops["MatMulIntegerToFloat"] == 2
    dora = randomise(program.apply(surgery.Lora(target="all", rank=2, dora=True)))
    assert dora.export(tmp_path / "dora.onnx").parity.error <= 3e-2


def test_the_kit(planted):
    report = check_pass(
        surgery.Quantize(**SMOOTH, activation_budget=0.02),
        planted,
        checks=(*KIT, "second", "reload", "unflatten"),
    )
    assert not report.failed, report


# -- refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "int8", "smooth": 0.5}, "--smooth is for int8-dynamic, which rounds inputs, and this is int8"),
        ({"format": "int4", "activation_budget": 0.1}, "--activation-budget is for int8-dynamic, .*; leave it out"),
        ({"format": "int8-dynamic", "smooth": 1.0}, "'quantize': --smooth is 1.0: input should be less than 1"),
        ({"format": "int8-dynamic", "smooth": -0.1}, "'quantize': --smooth is -0.1: input should be greater"),
        ({"format": "int8-dynamic", "smooth": float("nan")}, "'quantize': --smooth is nan: "),
        ({"format": "int8-dynamic", "activation_budget": 0}, "'quantize': --activation-budget is 0: input should"),
        ({"format": "int8-dynamic", "activation_budget": float("inf")}, "--activation-budget is inf: .*finite"),
    ],
)  # fmt: skip
def test_bad_options(options, said):
    with pytest.raises(PassError, match=said):
        surgery.Quantize.parse({"target": "all", **options})


@pytest.mark.parametrize("option", ["smooth", "activation_budget"])
def test_data_that_say_nothing_or_are_not_there(option):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16))
    passed = surgery.Quantize(target="all", format="int8-dynamic", **{option: 0.5})
    base = surgery.capture(module.eval(), (torch.randn(4, 16),))
    with pytest.raises(PassError, match="its input is zero on all of the data"):
        base.apply(passed, data=[((torch.zeros(4, 16),), {})])
    with pytest.raises(PassError, match="contains inf or NaN; clean the data"):
        base.apply(passed, data=[((torch.full((4, 16), torch.nan),), {})])
    absent = surgery.capture(module.to("meta"), (torch.randn(4, 16, device="meta"),))
    flag = "--" + option.replace("_", "-")
    with pytest.raises(PassError, match=f"its weight is not in memory, and {flag} has to read it"):
        absent.apply(passed)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "smoothed"
    given = ["apply", f"hf:{minilm_path()}", "--pass", "quantize", "--target", "mlp.*", "-o", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--format", "int8-dynamic", "--smooth", "0.65", "--activation-budget", "0.05"])
    assert ended.value.code == 0
    capsys.readouterr()
    (entry,) = surgery.load(str(out)).journal.find("quantize")
    assert (entry.options["smooth"], entry.options["activation_budget"]) == (0.65, 0.05)
    assert {record.decided["kept"] for record in entry.sites} == {True, False}
    with pytest.raises(SystemExit) as ended:
        main([*given, "--smooth", "0.5"])
    assert ended.value.code != 0
    assert "--smooth is for int8-dynamic" in capsys.readouterr().err
