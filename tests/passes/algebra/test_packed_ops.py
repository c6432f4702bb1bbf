"""Adapters on third-party packed ops: DoRA, PiSSA, sparse updates and others, with the op unchanged.

The tolerance is 1e-5 of the values' scale in fp32: the compared values are sums of a dozen products in another order,
each within half a unit in the last place (6e-8), and a square root and a quotient of such sums.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.api import LINEAR, PassError, SurgeryError, WeightOp, hookimpl
from surgery.api.programs import make_plugin_manager
from surgery.engine.contract.observe import relative_difference
from surgery.passes.sparse.sparse_tune import SparseTune
from surgery.testing import check_pass
from tests.shared.packed import (
    PASSES,
    WITHIN,
    Linear4,
    Linear8Dynamic,
    Packed,
    capture,
    formula,
    tensors_at,
    trained,
)


class Two(nn.Module):
    """One op that is linear in its input, and one that rounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.own = Linear4(8, 12)
        self.dynamic = Linear8Dynamic(12, 6)

    def forward(self, x):
        return self.dynamic(torch.tanh(self.own(torch.tanh(self.first(x)))))


def two() -> nn.Module:
    torch.manual_seed(3)
    return Two()


def two_with_inputs():
    return two(), (torch.randn(3, 5, 6),)


passes = pytest.mark.parametrize("pass_", PASSES.values(), ids=PASSES)


def rounded(x):
    """As the second op rounds its activation, with the gradient straight through."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return x + ((x / step).round() * step - x).detach()


@passes
def test_outputs_and_gradients_are_those_of_the_formula_on_floats(pass_):
    module, program = two(), capture(two())
    adapted = program.apply(pass_)
    assert torch.equal(adapted.run(), program.run())  # to the bit, before anything is trained
    trained(adapted)
    runs = adapted.module()
    x = program.example_inputs[0][0]
    probing = torch.randn(x.shape[0], x.shape[1], 6)
    found = runs(x)
    (found * probing).sum().backward()
    leaves = {
        layer: {
            n: t.detach().clone().requires_grad_()
            for n, t in tensors_at(adapted, layer).items()
            if t.requires_grad
        }
        for layer in ("own", "dynamic")
    }
    hidden = torch.tanh(module.first(x))
    hidden = torch.tanh(formula(pass_, module.own, hidden, hidden, leaves["own"], tensors_at(adapted, "own")))
    wanted = formula(
        pass_,
        module.dynamic,
        hidden,
        rounded(hidden),
        leaves["dynamic"],
        tensors_at(adapted, "dynamic"),
    )
    assert relative_difference(wanted, found) < WITHIN
    assert relative_difference(found, program.run()) > 1e-2
    (wanted * probing).sum().backward()
    for layer, own in leaves.items():
        for name, leaf in own.items():
            given = tensors_at(adapted, layer)[name].grad
            assert relative_difference(leaf.grad, given) < WITHIN, (layer, name)


@passes
def test_the_op_and_its_codes_stay(pass_):
    program = capture(two())
    adapted = program.apply(pass_)
    ops = [str(n.target) for n in adapted.graph.nodes if "surgery_packed" in str(n.target)]
    assert ops == ["surgery_packed.linear4.default", "surgery_packed.linear8_dynamic.default"]
    sizes = {8 * 12, 12 * 6}
    assert not sizes & {t.numel() for t in adapted.tensors.values()}  # no weight in floats
    trained(adapted)
    assert torch.equal(adapted.undo(adapted.journal.entries[-1].id).run(), program.run())
    with pytest.raises(SurgeryError, match="packed for surgery_packed"):
        adapted.merge()


@passes
def test_saved_and_loaded_without_measuring_anything(pass_, tmp_path, monkeypatch):
    ref, plugins = (
        "py:tests.passes.algebra.test_packed_ops:two_with_inputs",
        make_plugin_manager(plugins=(Packed(),)),
    )
    adapted = trained(surgery.load(ref, plugins=plugins).apply(pass_))
    adapted.save(tmp_path / "saved")

    def measured(*args, **kwargs):
        raise AssertionError("loading reads the weight")

    for place in (
        "engine.probe.Probe.weight",
        "passes.measure.fisher.fisher_of",
        "passes.lora.pissa.Split._principal",
    ):
        monkeypatch.setattr(f"surgery.{place}", measured)
    torch.manual_seed(9)
    again = surgery.load(str(tmp_path / "saved"), base=ref, plugins=plugins)
    assert torch.equal(again.run(), adapted.run())
    assert {n for n, t in again.tensors.items() if t.requires_grad} == {
        n for n, t in adapted.tensors.items() if t.requires_grad
    }


@pytest.mark.parametrize("name", ["dora", "pissa", "magnitude"])
def test_the_kit(name):
    """The conformance kit, including ONNX in onnxruntime, on ops that are linear, so that slopes match gradients."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Linear4(8, 12), nn.Tanh(), Linear4(12, 6, bias=False))
    pass_ = PASSES[name].model_copy(update={"target": "path:2.packed,path:4.packed"})
    report = check_pass(pass_, capture(model))
    assert {"numerics", "undo", "reload", "reexport", "gradients", "onnx"} <= set(passed(report))


def passed(report):
    return [outcome.check for outcome in report.outcomes if outcome.status == "passed"]


def test_onnx_of_an_op_that_rounds_its_activation(tmp_path):
    program = capture(two())
    for name, label in (("pissa", "a"), ("magnitude", "b"), ("dora", "c")):
        program = program.apply(PASSES[name].model_copy(update={"label": label}))
    report = trained(program).export(tmp_path / "model.onnx")
    # A value on the edge between two of 255 steps may round either way: one step of a largest hidden value of 1.
    assert report.parity.error < 1e-2
    assert {"own.packed", "dynamic.packed", *program.tensors} <= set(report.stored)


def test_what_has_no_gradient_is_not_chosen_by_one():
    """On torch's own int8 product adapters work and have gradients; the weight itself has none."""
    op = torch.ops.aten._weight_int8pack_mm.default

    class Plugin:
        @hookimpl
        def surgery_weight_ops(self):
            unpack = {"dequantize": lambda t: t["mat2"] * t["scales"][:, None]}
            return {op: WeightOp(LINEAR, "self", ("mat2", "scales"), None, **unpack)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.randint(-127, 128, (32, 32), dtype=torch.int8)
            self.first = nn.Linear(32, 32)
            self.codes = nn.Parameter(codes, requires_grad=False)
            self.register_buffer("scales", torch.rand(32) / 100 + 1e-3)
            self.bias = nn.Parameter(torch.randn(32))

        def forward(self, x):
            return op(self.first(x), self.codes, self.scales) + self.bias

    torch.manual_seed(3)
    model, x = Model().eval(), torch.randn(4, 32)
    hidden = model.first(x)
    program = surgery.capture(model, (x,), plugins=make_plugin_manager(plugins=(Plugin(),)))
    for name in ("dora", "pissa", "magnitude"):
        adapted = trained(program.apply(PASSES[name].model_copy(update={"target": "codes"})))
        own = tensors_at(adapted, "codes")
        model.weight = lambda: model.codes * model.scales[:, None]
        wanted = formula(PASSES[name], model, hidden, hidden, own, own)
        assert relative_difference(wanted, adapted.run()) < WITHIN
        adapted.module()(x).square().sum().backward()
        assert all(t.grad is not None for t in adapted.tensors.values() if t.requires_grad)
    with pytest.raises(
        PassError, match=r"there is no gradient.*_weight_int8pack_mm.*choose by another criterion"
    ):
        program.apply(SparseTune(target="codes", by="gradient"))


@pytest.mark.parametrize("name", ["dora", "pissa", "magnitude"])
def test_a_live_model(name):
    model, x = two(), torch.randn(3, 5, 6)
    before = model(x)
    plugins = make_plugin_manager(plugins=(Packed(),))
    surgery.apply_(model, PASSES[name], inputs=(x,), plugins=plugins)
    assert torch.equal(model(x), before)
    adapted = trained(capture(two()).apply(PASSES[name]))
    held = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, tensor in adapted.tensors.items():
            held[name].copy_(tensor)
    assert torch.equal(model(x), adapted.run(x))
    surgery.remove_(model)
    assert torch.equal(model(x), before)


def test_pissa_is_written_for_peft_without_an_svd(tmp_path):
    program = capture(two())
    adapted = trained(program.apply(PASSES["pissa"]))
    surgery.export_peft(adapted, tmp_path / "peft")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for layer in ("own", "dynamic"):
        a, b = (next(t for n, t in found.items() if f"{layer}.lora_{x}" in n) for x in "AB")
        own = tensors_at(adapted, layer)
        assert a.shape[0] == 6
        assert relative_difference(own["B"] @ own["A"] - own["B0"] @ own["A0"], b @ a) < WITHIN
