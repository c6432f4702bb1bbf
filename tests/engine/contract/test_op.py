"""OpPass: another op under the adapters, by the example plugin int8_matmul."""

from __future__ import annotations

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import surgery
from surgery.api import PassError
from surgery.common.plugins import make_plugin_manager
from tests.shared.example_plugins import example_plugin
from tests.techniques.catalogue import of

Int8Matmul = example_plugin("int8_matmul").Int8Matmul
# fp32: the same products in another order.
ROUNDING = 2e-6
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class Columns(nn.Module):
    """W @ x, with the features next to last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return (self.weight @ x.t()).t()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def program(module=None) -> surgery.Program:
    return surgery.capture(module or mlp(), (X,), dynamic=({0: "batch"},))


def rounded(module: nn.Module, *names: str) -> nn.Module:
    """The module with weights that are what the codes stand for."""
    with torch.no_grad():
        for name in names:
            weight = module.get_parameter(name)
            scales = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((weight / scales).round() * scales)
    return module


def assert_close(found, want, times: float = 1.0) -> None:
    found, want = found.detach(), want.detach()
    assert float((found - want).abs().max()) <= times * ROUNDING * float(want.abs().max())


def test_it_computes_with_the_codes():
    adapted = program().apply(Int8Matmul(target="0,2"))
    assert_close(adapted.run(X), rounded(mlp(), "0.weight", "2.weight")(X))
    assert not torch.equal(adapted.run(X), program().run(X))
    assert {n: t.dtype for n, t in adapted.tensors.items() if n.startswith("0.")} == {
        "0.int8-matmul.codes": torch.int8,
        "0.int8-matmul.scales": torch.float32,
    }
    # The weights are neither held by the module nor counted.
    assert "0.weight" not in adapted.module().state_dict()
    assert adapted.count_parameters()[0] == program().count_parameters()[0] - 2 * 64
    assert torch.equal(adapted.undo("int8-matmul").run(X), program().run(X))


def test_where_the_weight_is_the_left_operand():
    torch.manual_seed(0)
    module = Columns()
    adapted = program(module).apply(Int8Matmul(target="all"))
    with torch.no_grad():
        want = rounded(module, "weight")(X)
    assert_close(adapted.run(X), want)


ADAPTERS = {
    "lora": lambda: surgery.Lora(target="0,2", rank=2),
    "ia3": lambda: of("ia3", target="0,2"),
}


@pytest.mark.parametrize("order", ["beneath", "above"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_under_an_adapter(name, order):
    """An adapter on a model with rounded weights gives the same, applied before the op or after it."""
    make = ADAPTERS[name]
    passes = [make(), Int8Matmul(target="0,2")]
    adapted = program().apply(*(passes if order == "beneath" else passes[::-1]))
    own = [n for n, t in adapted.tensors.items() if isinstance(t, nn.Parameter)]
    plain = program(rounded(mlp(), "0.weight", "2.weight")).apply(make())
    assert sorted(own) == sorted(plain.tensors)
    with torch.no_grad():
        for n in own:
            value = torch.randn(plain.tensors[n].shape, generator=torch.Generator().manual_seed(len(n)))
            plain.tensors[n].copy_(value)
            adapted.tensors[n].copy_(value)
    assert_close(adapted.run(X), plain.run(X), times=4)
    with torch.no_grad():
        bare = rounded(mlp(), "0.weight", "2.weight")(X)
    assert float((bare - plain.run(X)).abs().max()) > 0.01
    adapted.module()(X).sum().backward()
    plain.module()(X).sum().backward()
    theirs = dict(plain.module().named_parameters())
    for n, parameter in adapted.module().named_parameters():
        if n in own:
            assert_close(parameter.grad, theirs[n].grad, times=20)
    # Merging says why the adapter stays.
    with pytest.raises(PassError, match=r"int8-matmul has replaced 0\.weight"):
        adapted.merge()


def lora_on_op() -> surgery.Program:
    adapted = program().apply(Int8Matmul(target="0,2"), surgery.Lora(target="0,2,4", rank=2))
    with torch.no_grad():
        for n, t in adapted.tensors.items():
            if isinstance(t, nn.Parameter):
                t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(len(n))))
    return adapted


def test_onnx_without_a_registered_plugin(tmp_path):
    """The class brings the ONNX form of its op; the file has codes and no float weight of the site."""
    adapted = lora_on_op()
    adapted.export(tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    held = {i.name: i.data_type for i in file.graph.initializer}
    assert held["0.int8-matmul.codes"] == onnx.TensorProto.INT8
    assert "0.weight" not in held
    assert "4.weight" in held
    assert "DequantizeLinear" in {node.op_type for node in file.graph.node}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X[:2].numpy()})
    assert numpy.abs(found - adapted.run(X[:2]).numpy()).max() <= 20 * ROUNDING * numpy.abs(found).max()


def test_saved_and_live(tmp_path):
    adapted = lora_on_op()
    adapted.save(tmp_path / "saved")
    plugins = make_plugin_manager(plugins=(Int8Matmul,))
    loaded = surgery.load(str(tmp_path / "saved"), base=program(), plugins=plugins)
    assert torch.equal(loaded.run(X), adapted.run(X))
    model = mlp()
    surgery.load_(model, tmp_path / "saved", inputs=(X,), plugins=plugins)
    assert_close(model(X).detach(), adapted.run(X))
    surgery.remove_(model)
    assert torch.equal(model(X), mlp()(X))


def test_passes_that_compute_with_the_weight_are_refused():
    adapted = program().apply(Int8Matmul(target="0"))
    for pass_ in (surgery.Lora(target="0", rank=2, dora=True), surgery.Quantize(target="0", format="int8")):
        with pytest.raises(PassError, match=r"int8-matmul'? has put another op in its place; \w+ "):
            adapted.apply(pass_)
    with pytest.raises(PassError, match=r"'int8-matmul' has put another op in its place; leave the site out"):
        adapted.apply(Int8Matmul(target="0", label="again"))


class Reads(Int8Matmul):
    name = "reads"

    def op(self, site, g):
        return g.call(torch.ops.aten.neg.default, g.op_output)


class Narrow(Int8Matmul):
    name = "narrow"

    def op(self, site, g):
        return g.call(torch.ops.aten.narrow.default, super().op(site, g), -1, 0, 1)


@pytest.mark.parametrize(
    ("cls", "said"),
    [(Reads, r"computed from g\.op_input and without the op"), (Narrow, r"a value of shape \w+ × 1")],
)
def test_a_wrong_op_is_refused(cls, said):
    with pytest.raises(PassError, match=said):
        program().apply(cls(target="0"))


def test_later_passes_see_the_new_op_as_the_op():
    """A pass that builds on g.op_output gets the value of the new op, and cannot run the old one again."""
    seen = []

    class Look(surgery.api.RewritePass):
        name = "look"

        def rewrite(self, site, g):
            seen.append(g.op_output.target)
            try:
                g.call_op_on(g.x)
            except PassError as error:
                seen.append(str(error))
            return

    program().apply(Int8Matmul(target="0")).apply(Look(target="0"), verify=False)
    assert seen[0] is torch.ops.int8_matmul.linear.default
    assert "int8-matmul has put another op in its place" in seen[1]
