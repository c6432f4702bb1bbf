"""fuse-gelu and fuse-rmsnorm: the forms that models write, undone, trained, exported to one ONNX op."""

from __future__ import annotations

import collections

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from surgery.api import PassError
from surgery.api.programs import TargetError
from surgery.engine.contract.observe import observe
from surgery.testing import check_pass
from tests.shared.eager_attention import program
from tests.techniques.catalogue import of

aten = torch.ops.aten


def ops_of(program):
    return collections.Counter(n.target for n in program.module().graph_module(training=False).graph.nodes)


def written(program, path, **options):
    report = program.export(path, **options)
    return report, collections.Counter(node.op_type for node in onnx.load(path).graph.node)


class Formed(nn.Module):
    """A function of one tensor after a linear layer, so that there is something to train."""

    def __init__(self, function, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(8, 8, dtype=dtype), function
        self.weight = nn.Parameter(torch.rand(8, dtype=dtype) + 0.5)

    def forward(self, x):
        return self.function(self.linear(x), self.weight)


def formed(function, dtype=torch.float32):
    return surgery.capture(Formed(function, dtype), (torch.randn(3, 8, dtype=dtype),), {"x": {0: "batch"}})


GELUS = {
    "gpt2": (lambda x, w: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0)))), "tanh"),
    "fast": (lambda x, w: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))), "tanh"),
    "bloom": (lambda x, w: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))), "tanh"),
    "outside": (lambda x, w: 0.5 * (x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))), "tanh"),
    "bert": (lambda x, w: x * 0.5 * (1.0 + torch.erf(x / 1.4142135623730951)), "none"),
    "halved": (lambda x, w: x / 2 * (1.0 + torch.erf(x * 0.7071067811865476)), "none"),
}  # fmt: skip


@pytest.mark.parametrize("form", list(GELUS))
def test_a_gelu_in_every_form(form):
    function, kind = GELUS[form]
    base = formed(function)
    fused = base.apply(of("fuse-gelu"))
    (node,) = [
        n for n in fused.module().graph_module(training=False).graph.nodes if n.target is aten.gelu.default
    ]
    assert node.kwargs == {"approximate": kind}
    assert not {aten.tanh.default, aten.erf.default, aten.mul.Tensor} & set(ops_of(fused))
    # One rounding of each of a dozen steps in fp32: 1e-7 of values of about one.
    torch.testing.assert_close(fused.run(), base.run(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, w: 0.5 * x * (1 + torch.tanh(0.79 * (x + 0.044715 * torch.pow(x, 3)))), "0.79"),
        (lambda x, w: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.05 * torch.pow(x, 3)))), "0.05"),
        (lambda x, w: 0.5 * w * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3)))), "'x' is"),
    ],
)
def test_what_is_no_gelu_stays_and_says_why(function, why):
    base = formed(function)
    (planned,) = base.plan(of("fuse-gelu")).passes
    assert not planned.sites
    assert any(why in miss.reason for miss in planned.misses)
    with pytest.raises(PassError, match="its pattern is nowhere in this model; nearly at"):
        base.apply(of("fuse-gelu"))


def norm(x, w, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


NORMS = {
    "llama": lambda x, w: w * norm(x.to(torch.float32), w).to(x.dtype),
    "t5": lambda x, w: w * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-5)),
    "gemma": lambda x, w: (norm(x.float(), w) * (1.0 + w.float())).type_as(x),
    "square": lambda x, w: norm(x, w) * w,
    "product": lambda x, w: w * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)),
    "power": lambda x, w: w * (x * torch.pow(x.pow(2).mean(1, keepdim=True) + 1e-5, -0.5)),
    "reciprocal": lambda x, w: x * (1 / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)) * w,
    "bare": lambda x, w: norm(x, w) + w.sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(NORMS))
def test_an_rmsnorm_in_every_form(form, dtype):
    if (form, dtype) == ("t5", torch.bfloat16):
        pytest.skip("T5 casts to the dtype of its weight before that, which is the form of Llama")
    base = formed(NORMS[form], dtype)
    fused = base.apply(of("fuse-rmsnorm"))
    counts = ops_of(fused)
    assert counts[aten.rms_norm.default] == 1
    assert not {aten.mean.dim, aten.rsqrt.default, aten.sqrt.default} & set(counts)
    assert fused.reports[-1].plan.accepted[0].site.decided == {"eps": 1e-5, "weighted": form != "bare"}
    # A sum of eight squares in another order, or in bf16 half an ulp more before the weight: 2^-8 of values up to 4.
    torch.testing.assert_close(fused.run(), base.run(), atol=1e-6 if dtype is torch.float32 else 0.04, rtol=0)


def test_a_norm_over_another_axis_stays():
    base = formed(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5)))
    (planned,) = base.plan(of("fuse-rmsnorm")).passes
    assert not planned.sites
    assert "its dim is 0, and the pattern has axis -1" in {miss.reason for miss in planned.misses}


def test_what_is_no_weight_stays_outside_of_the_norm():
    fused = formed(lambda x, w: x * norm(x, w) + w.sum()).apply(of("fuse-rmsnorm"))
    (site,) = fused.reports[-1].plan.accepted
    assert site.site.decided == {"eps": 1e-5, "weighted": False}
    assert ops_of(fused)[aten.mul.Tensor] == 1


def test_the_norm_is_a_site_then_and_its_weight_trains():
    fused = program("llama").apply(of("fuse-rmsnorm"))
    norms = [site for site in fused.sites if site.role == "norm"]
    assert [site.path for site in norms][:2] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]
    trained = fused.apply(of("freeze", target="all")).apply(of("full", target="norm"))
    assert {n for n in trained.parameter_names() if trained.trains(n)} == {site.weight for site in norms}


def test_one_place_of_several_by_its_path_then_the_rest():
    base = program("gpt2")
    one = base.apply(of("fuse-gelu", target="h.1"))
    assert ops_of(one)[aten.gelu.default] == 1
    both = one.apply(of("fuse-gelu", **{"as": "rest", "target": "h.0"}))
    assert ops_of(both)[aten.gelu.default] == 2
    plan = both.plan(of("fuse-gelu", **{"as": "third"})).passes[-1]
    assert [p.refusal for p in plan.sites] == [
        "'fuse-gelu:rest' has put another op in its place",
        "'fuse-gelu' has put another op in its place",
    ]
    left = both.undo("fuse-gelu")
    assert [r.path for e in left.journal for r in e.sites] == ["transformer.h.0.mlp.act"]
    assert ops_of(left)[aten.gelu.default] == 1
    with pytest.raises(TargetError, match=r"h\.2"):
        base.apply(of("fuse-gelu", target="h.2"))


def test_saved_and_loaded_although_it_adds_no_tensor(tmp_path):
    fused = program("gpt2").apply(of("fuse-gelu"))
    fused.save(tmp_path / "fused")
    again = surgery.load(str(tmp_path / "fused"), base=program("gpt2"))
    assert observe(fused.run(), again.run()).equal
    assert ops_of(again)[aten.gelu.default] == 2


@pytest.mark.parametrize(
    ("name", "pass_name", "there", "gone"),
    [
        pytest.param("gpt2", "fuse-gelu", "Gelu", "Tanh", marks=pytest.mark.slow),
        ("llama", "fuse-rmsnorm", "RMSNormalization", "ReduceMean"),
    ],
)
def test_one_onnx_op_for_each(name, pass_name, there, gone, tmp_path):
    base = program(name)
    fused = base.apply(of(pass_name))
    report, counts = written(fused, tmp_path / "fused.onnx")
    assert counts[there] == len(fused.journal.entries[-1].sites)
    assert not counts[gone]
    assert report.parity.error < 1e-5  # the exporter's own limit is wider; both run the same sums in fp32
    before, _ = written(base, tmp_path / "base.onnx")
    assert report.nodes < before.nodes


def test_with_lora_beside_and_merged():
    base = program("gpt2")
    adapted = base.apply(of("fuse-gelu"), surgery.Lora(target="mlp.*", rank=2))
    assert [e.pass_name for e in adapted.journal] == ["fuse-gelu", "freeze", "lora"]
    merged = adapted.merge()
    assert ops_of(merged)[aten.gelu.default] == 2
    assert observe(base.run(), merged.run()).difference < 1e-5
    other = base.apply(surgery.Lora(target="mlp.*", rank=2)).apply(of("fuse-gelu"))
    assert observe(adapted.run(), other.run()).equal


@pytest.mark.slow
def test_conformance_of_fuse_gelu():
    report = check_pass(of("fuse-gelu"), program("gpt2"))
    assert not [o for o in report.outcomes if o.status == "failed"]


def test_conformance_of_fuse_rmsnorm():
    report = check_pass(of("fuse-rmsnorm"), program("llama"))
    assert not [o for o in report.outcomes if o.status == "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "gemma", "gemma2", "qwen3", "mistral", "olmo2", "phi3"])
def test_conformance_of_fuse_rmsnorm_on_other_architectures(name):
    found = sum(n.target is aten.rsqrt.default for n in program(name).graph.nodes)
    assert len(program(name).plan(of("fuse-rmsnorm")).passes[-1].accepted) == found > 0
    check_pass(of("fuse-rmsnorm"), program(name))


def test_functional_gelu_is_left_alone():
    base = formed(lambda x, w: functional.gelu(x) * w)
    with pytest.raises(PassError, match="its pattern is nowhere in this model"):
        base.apply(of("fuse-gelu"))
