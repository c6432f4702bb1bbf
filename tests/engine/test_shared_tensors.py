"""Tensors that sites share: VeRA's frozen matrices, and a trained one; through every way that a program goes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery.api import ADAPTER, AddLowRank, Fold, PassError, RewritePass, TensorSpec, scale_output
from surgery.common.plugins import make_plugin_manager
from surgery.store.migrate import migrated
from tests.shared.example_plugins import example_plugin

Vera = example_plugin("vera").Vera
# fp32: the same products in another order.
ROUNDING = 1e-6


class Common(RewritePass):
    """y ⊙ g with one trained g for all sites of a width."""

    name: ClassVar[str] = "common"
    effect = replace(ADAPTER, scalable=True)

    def tensors(self, site):
        return {"g": TensorSpec((site.out_features,), nn.init.ones_, shared=True)}

    def rewrite(self, site, g):
        return scale_output(site, g, g["g"])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def program(*passes) -> surgery.Program:
    captured = surgery.capture(net(), (X,), dynamic={"input": {0: "batch"}})
    return captured.apply(*passes) if passes else captured


def filled(adapted, seed=2):
    """The program with random values of every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapted.tensors.values():
            if isinstance(tensor, nn.Parameter):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return adapted


def shared(names: Any) -> list[str]:
    return sorted(name for name in names if ".A_" in name or ".B_" in name)


ONCE = ["vera.A_4x8", "vera.B_3x4", "vera.B_8x4"]


def test_drawn_once_for_each_shape():
    adapted = program(Vera(target="all", rank=4))
    assert shared(adapted.tensors) == ONCE
    records = {record.path: record.tensors for record in adapted.journal.entries[-1].sites}
    assert records["0"]["A"] == records["2"]["A"] == records["4"]["A"] == "vera.A_4x8"
    assert records["0"]["B"] == records["2"]["B"] != records["4"]["B"]
    assert records["0"]["d"] != records["2"]["d"]
    # What a site gets does not depend on which others are targeted.
    alone = program(Vera(target="2", rank=4)).journal.entries[-1].sites[0]
    assert alone.tensors == records["2"]


def test_the_plan_and_the_sizes_count_it_once():
    bare = program()
    assert bare.plan(Common(target="0,2")).passes[-1].parameters == 8
    adapted = bare.apply(Common(target="0,2"))
    assert adapted.count_parameters()[1] == 8


def test_the_gradient_is_the_sum_over_the_sites():
    adapted = program(Common(target="0,2"))
    module = adapted.module()
    module(X).pow(2).sum().backward()
    (found,) = (p.grad for n, p in module.named_parameters() if n == "common.g_8")
    g = [torch.ones(8, requires_grad=True) for _ in range(2)]
    first, _, second, _, last = net()
    last((second((first(X) * g[0]).relu()) * g[1]).relu()).pow(2).sum().backward()
    assert torch.allclose(found, g[0].grad + g[1].grad, atol=1e-5)  # fp32, sums of 5 rows
    with pytest.raises(AssertionError):
        assert torch.allclose(found, g[0].grad, atol=1e-5)


def test_saved_once_and_loaded_as_one(tmp_path):
    adapted = filled(program(Vera(target="all", rank=4)))
    adapted.save(tmp_path / "saved", standalone=False)
    stored = {name for file in (tmp_path / "saved").glob("*.safetensors") for name in load_file(file)}
    assert shared(stored) == ONCE
    plugins = make_plugin_manager(plugins=(Vera,))
    loaded = surgery.load(str(tmp_path / "saved"), base=program(), plugins=plugins)
    assert shared(loaded.tensors) == ONCE
    assert torch.equal(loaded.run(X), adapted.run(X))
    held = dict(loaded.module().named_buffers(remove_duplicate=False))
    assert shared(held) == ONCE


def test_onnx_has_it_once(tmp_path):
    adapted = filled(program(Vera(target="all", rank=4)))
    adapted.export(tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    names = [initializer.name for initializer in file.graph.initializer]
    assert shared(names) == ONCE
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X[:2].numpy()})
    want = adapted.run(X[:2])
    assert float((torch.from_numpy(found) - want).abs().max()) <= ROUNDING * float(want.abs().max()) * 10


def test_merged_undone_and_gone_on():
    bare, adapted = program(), filled(program(Vera(target="all", rank=4)))
    want = adapted.run(X)
    merged = adapted.merge()
    assert torch.allclose(merged.run(X), want, atol=ROUNDING * 10 * float(want.abs().max()))
    assert shared(n for n in merged.module().state_dict()) == []
    undone = adapted.undo("vera")
    assert undone.tensors == {}
    assert torch.equal(undone.run(X), bare.run(X))
    after = merged.apply(Vera(target="0", rank=4))
    assert shared(after.tensors) == ["vera.A_4x8", "vera.B_8x4"]
    assert torch.equal(after.run(X), merged.run(X))


@pytest.mark.parametrize("how", ["requantize", "residual"])
def test_merged_into_codes(how):
    """The matrices stay for the site that is not quantized."""
    quantized = program(surgery.Quantize(target="0,2", format="int8"), Vera(target="0,2,4", rank=4))
    adapted = filled(quantized)
    merged = adapted.merge(quantized=how)
    want = adapted.run(X)
    # Codes of 8 bits: a 127th of the largest weight of a row, over two layers.
    assert float((merged.run(X) - want).abs().max()) <= 0.05 * float(want.abs().max())
    read = {str(node.target) for node in merged.graph.nodes if node.op == "get_attr" and node.users}
    assert shared(read) == ["vera.A_4x8", "vera.B_3x4"]


def test_a_second_adapter_has_its_own():
    both = program(Vera(target="all", rank=4)).apply(Vera(target="0,2", rank=4, label="film"))
    assert shared(both.tensors) == sorted([*ONCE, "vera_film.A_4x8", "vera_film.B_8x4"])
    filled(both)
    left = both.undo("vera")
    assert shared(left.tensors) == ["vera_film.A_4x8", "vera_film.B_8x4"]
    assert torch.equal(left.run(X), both.without("vera").run(X))


class Shift(Common):
    """y + v with one v for all sites of a width; combined by summing."""

    name: ClassVar[str] = "shift"
    spread: ClassVar[float] = 0.0

    def tensors(self, site):
        return {"v": TensorSpec((site.out_features,), shared=True)}

    def rewrite(self, site, g):
        return g.call(torch.ops.aten.add.Tensor, g.output, g["v"], alpha=g.weight)

    @staticmethod
    def combiner(places, how, label):
        summed = [sum(s.weight * s.tensors["v"] for s in place.sources) for place in places]
        return Shift(label=label), [{"v": v + n * Shift.spread} for n, v in enumerate(summed)]


def test_combined(monkeypatch):
    both = filled(program(Shift(target="0,2", label="a"), Shift(target="0,2", label="b")))
    weights = {"shift:a": 0.5, "shift:b": -2.0}
    combined = both.combine(weights, "cat", label="both")
    assert list(combined.tensors) == ["shift_both.v_8"]
    want = both.weighted(weights).run(X)
    assert torch.allclose(combined.run(X), want, atol=ROUNDING * 10 * float(want.abs().max()))
    # Against the contract: another value at each site.
    monkeypatch.setattr(Shift, "spread", 1.0)
    with pytest.raises(PassError, match=r"combine at 2: shift gives shift_both\.v_8, which sites share"):
        both.combine(weights, "cat", label="both")


def live():
    model = net()
    surgery.apply_(model, Vera(target="all", rank=4), inputs=(X,))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith((".b", ".d")):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def test_a_live_model_holds_it_once(tmp_path):
    model = live()
    want = model(X)
    assert torch.equal(surgery.program_of(model).run(X), want)
    assert len(list(model.buffers())) == len(ONCE)
    # A conversion replaces buffers; copying keeps them together.
    for other in (copy.deepcopy(model), live().double(), live().double().float()):
        assert len(list(other.buffers())) == len(ONCE)
        x = X.to(next(other.parameters()).dtype)
        assert torch.allclose(other(x).float(), want, atol=ROUNDING * 10 * float(want.detach().abs().max()))
        assert shared(surgery.program_of(other).tensors) == ONCE
    surgery.save_(model, tmp_path / "saved")
    fresh = net()
    surgery.load_(fresh, tmp_path / "saved", inputs=(X,), plugins=make_plugin_manager(plugins=(Vera,)))
    assert torch.equal(fresh(X), want)
    assert len(list(fresh.buffers())) == len(ONCE)
    surgery.remove_(model)
    assert not list(model.buffers())
    assert torch.equal(model(X), net()(X))


def test_a_live_model_trains_one_tensor():
    model = net()
    surgery.apply_(model, Common(target="0,2"), inputs=(X,))
    (trained,) = (p for p in model.parameters() if p.requires_grad)
    model(X).pow(2).sum().backward()
    other = program(Common(target="0,2")).module()
    other(X).pow(2).sum().backward()
    assert torch.allclose(trained.grad, dict(other.named_parameters())["common.g_8"].grad, atol=1e-5)


def test_half_precision_has_the_dtype_in_its_name():
    module = net().bfloat16()
    adapted = surgery.capture(module, (X.bfloat16(),)).apply(Vera(target="all", rank=4))
    assert shared(adapted.tensors) == [f"{name}_bfloat16" for name in ONCE]


class Clash(Common):
    """Gives all sites one name without saying that they share it."""

    name: ClassVar[str] = "clash"
    says: bool = False

    def tensors(self, site):
        return {"g": TensorSpec((site.out_features,), nn.init.ones_, shared=self.says)}

    def names(self, site, tensors):
        return {"g": "clash.g"}


def test_one_name_that_is_not_declared_shared_is_refused():
    with pytest.raises(PassError, match=r"clash: 0 and 2 both name their tensor clash\.g; declare it with"):
        program(Clash(target="0,2"))
    with pytest.raises(PassError, match=r"0 and 4 both name their tensor clash\.g, but it differs in shape"):
        program(Clash(target="0,4", says=True))
    assert list(program(Clash(target="0,2", says=True)).tensors) == ["clash.g"]


class Later(Common):
    """Version 2 of `common`, which stores the logarithm under another name."""

    version = 2
    add: ClassVar[list[float]] = [0.0]

    def tensors(self, site):
        return {"log": TensorSpec((site.out_features,), shared=True)}

    @classmethod
    def migrate(cls, options: Any, tensors: Mapping[str, Tensor], version: int):
        return options, {"log": tensors["g"].log() + cls.add[0]}

    def merge(self, site, tensors, weight) -> Mapping[str, Fold]:
        return {"weight": AddLowRank(site, tensors["log"], tensors["log"], weight)}


def test_a_new_version_of_the_pass_migrates_it_once(monkeypatch):
    adapted = filled(program(Common(target="0,2")))
    with torch.no_grad():
        adapted.tensors["common.g_8"].abs_()
    plugins = make_plugin_manager(plugins=(Later,))
    journal, tensors, names = migrated(adapted.journal, adapted.tensors, plugins, "saved")
    assert names == {"common.log_8": "common.g_8"}
    assert torch.equal(tensors["common.log_8"], adapted.tensors["common.g_8"].log())
    assert [record.tensors for record in journal.entries[-1].sites] == [{"log": "common.log_8"}] * 2
