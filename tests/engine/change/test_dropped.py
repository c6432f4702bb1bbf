"""A pass that computes from g.x or g.op_output drops the adapters beneath it: the engine refuses, and names both."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_surgery_ia3 import IA3

import surgery
from surgery import api
from surgery.api import PassError
from surgery.api.programs import make_plugin_manager

mul = torch.ops.aten.mul.Tensor


class FromInput(api.RewritePass):
    """Test: the op runs again on its bare input."""

    name = "test-input"
    numerics = api.changes("test")
    effect = api.WEIGHT

    def rewrite(self, site, g):
        return g.call(mul, g.call_op_on(g.x), 1.5)


class FromOp(FromInput):
    """Test: the output of the op alone."""

    name = "test-op"

    def rewrite(self, site, g):
        return g.call(mul, g.op_output, 1.5)


class SecondCall(FromInput):
    """Test: right at the first call, wrong at the others."""

    name = "test-call"

    def rewrite(self, site, g):
        first = g.site_call.node is site.calls[0].node
        return g.call(mul, g.output if first else g.op_output, 1.5)


class Everywhere(api.GraphPass):
    """Test: a graph pass that wraps an op and forgets the value that it wraps."""

    name = "test-graph"
    numerics = api.changes("test")
    effect = api.WEIGHT

    def candidates(self, view):
        return list(view.sites)

    def rewrite(self, site, g):
        node = site.calls[0].node
        g.wrap(node, lambda value: g.call(mul, node, 1.5))


class FromOutput(FromInput):
    """Test: as it should be."""

    name = "test-output"

    def rewrite(self, site, g):
        return g.call(mul, g.output, 1.5)


class Plugin:
    @staticmethod
    @api.hookimpl
    def surgery_passes():
        return [FromInput, FromOp, SecondCall, Everywhere, FromOutput]


class Net(nn.Module):
    """A hidden layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(self.a(x).relu()).relu())


ADAPTERS = {
    "lora": lambda: surgery.Lora(target="a", rank=2),
    "ia3 on the output": lambda: IA3(target="a"),
    "ia3 on the input": lambda: IA3(target="a", scale="input"),
}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    plugins = make_plugin_manager(plugins=(Plugin,))
    return surgery.capture(Net().eval(), (torch.randn(3, 8),), plugins=plugins)


def adapted(base, name):
    program = base.apply(ADAPTERS[name]())
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_()
    return program


@pytest.mark.parametrize("wrong", [FromInput, FromOp, SecondCall, Everywhere])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_beneath_is_not_dropped(base, name, wrong):
    """LoRA and IA³ on the output would vanish under each; IA³ on the input only where the bare input is read."""
    program = adapted(base, name)
    entry = program.journal.entries[-1].id
    if name == "ia3 on the input" and wrong is not FromInput:
        done = program.apply(wrong(target="a"), verify=False)
        assert not torch.equal(done.run(), done.without(entry).run())
        return
    with pytest.raises(
        PassError, match=rf"{wrong.name} at a: .* the trained '{entry}' without effect; merge or undo"
    ):
        program.apply(wrong(target="a"), verify=False)
    # The remedies that the message names.
    assert program.undo(entry).apply(wrong(target="a"))
    if name == "lora":
        assert program.merge().apply(wrong(target="a"))
    good = program.apply(FromOutput(target="a"))
    assert not torch.equal(good.run(), good.without(entry).run())


def test_one_that_is_switched_on_later_is_not_dropped_either(base):
    """Off while the pass is applied, the adapter is not in the graph; switched on again, it has to act."""
    off = adapted(base, "lora").without("lora")
    done = off.apply(FromOp(target="a"))
    with pytest.raises(
        PassError, match="a later pass at a: it would leave the trained 'lora' without effect"
    ):
        done.weighted({"lora": 1.0}).run()


def test_a_directory_of_such_a_program_is_refused(base, tmp_path, monkeypatch):
    program = adapted(base, "lora")
    monkeypatch.setattr("surgery.engine.change.apply.refuse_dropped", lambda *_: None)
    program.apply(FromOp(target="a")).save(tmp_path / "saved")
    with pytest.raises(PassError, match="without effect"):
        surgery.load(str(tmp_path / "saved"), base=base, plugins=base.base.plugins)
