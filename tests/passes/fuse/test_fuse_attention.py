"""fuse-attention: the forms that models write, with masks, groups and dropout, and reasons for no match."""

from __future__ import annotations

import collections
import json
import math

import pytest
import torch
from torch import nn

import surgery
from surgery.api import PassError
from surgery.cli import main
from surgery.engine.contract.observe import observe
from surgery.testing import check_pass
from tests.shared.eager_attention import program
from tests.techniques.catalogue import of

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


class Attend(nn.Module):
    """Projections with heads, then a function of q, k, v (b, h, s, d) and a mask."""

    def __init__(self, function, groups=4):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * groups), nn.Linear(16, 4 * groups)
        self.function = function

    def forward(self, x, mask):
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.function(q, k, v, mask).transpose(1, 2).flatten(2)


def attend(function, groups=4, dtype=torch.float32):
    module = Attend(function, groups).to(dtype)
    mask = torch.zeros(3, 1, 5, 5, dtype=dtype).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
    return surgery.capture(
        module, (torch.randn(3, 5, 16, dtype=dtype), mask), {"x": {0: "batch"}, "mask": {0: "batch"}}
    )


def core(program):
    graph = program.module().graph_module(training=False).graph
    found = [n for n in graph.nodes if n.target is SDPA]
    counts = collections.Counter(n.target for n in graph.nodes)
    assert not {aten.softmax.int, aten.matmul.default, aten.bmm.default} & set(counts)
    return found


def repeat(x, n):
    b, groups, s, d = x.shape
    return x[:, :, None].expand(b, groups, n, s, d).reshape(b, groups * n, s, d)


FORMS = {
    "scaled behind": lambda q, k, v, m: (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v,
    "divided behind": lambda q, k, v, m: (q @ k.transpose(2, 3) / math.sqrt(4)).softmax(-1) @ v,
    "scaled before": lambda q, k, v, m: ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v,
    "keys scaled and turned": lambda q, k, v, m: (q @ (k.transpose(-2, -1) * 0.5)).softmax(-1) @ v,
    "not scaled": lambda q, k, v, m: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
    "masked": lambda q, k, v, m: (q @ k.transpose(-2, -1) * 0.5 + m).softmax(-1) @ v,
    "mask first": lambda q, k, v, m: (m + q @ k.transpose(-2, -1) / 2).softmax(-1) @ v,
    "mask and bias": lambda q, k, v, m: (q @ k.transpose(-2, -1) * 0.5 + v.new_ones(4, 5, 5) + m).softmax(-1) @ v,
    "filled": lambda q, k, v, m: (q @ k.transpose(-2, -1)).masked_fill(m < 0, -1e4).softmax(-1) @ v,
    "softmax in fp32": lambda q, k, v, m: torch.softmax(q @ k.mT * 0.5 + m, -1, torch.float32).to(q.dtype) @ v,
    "dropped": lambda q, k, v, m: torch.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.5, False) @ v,
    "three axes": lambda q, k, v, m: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1), v.flatten(0, 1)
    ).unflatten(0, (-1, 4)),
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
def test_an_attention_in_every_form(form):
    base = attend(FORMS[form])
    fused = base.apply(of("fuse-attention"))
    (node,) = core(fused)
    assert (node.args[3] is None) is not any(word in form for word in ("mask", "fill", "fp32"))
    # The softmax of five scores, summed in another order: a few ulps of values of about one.
    torch.testing.assert_close(fused.run(), base.run(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_repeated_keys_and_values_are_handed_over_as_they_are(groups):
    def grouped(q, k, v, m):
        k, v = repeat(k, 4 // groups), repeat(v, 4 // groups)
        return (q @ k.transpose(2, 3) * 0.5 + m).softmax(-1) @ v

    base = attend(grouped, groups)
    fused = base.apply(of("fuse-attention"))
    (node,) = core(fused)
    assert node.kwargs["enable_gqa"]
    assert [list(a.meta["val"].shape)[1] for a in node.args[:3]] == [4, groups, groups]
    torch.testing.assert_close(fused.run(), base.run(), atol=1e-6, rtol=0)


def test_keys_that_are_read_elsewhere_too_are_repeated_as_before():
    def grouped(q, k, v, m):
        k, v = repeat(k, 2), repeat(v, 2)
        return (q @ k.transpose(2, 3)).softmax(-1) @ v + k

    (node,) = core(attend(grouped, 2).apply(of("fuse-attention")))
    assert not node.kwargs["enable_gqa"]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (
            lambda q, k, v, m: (50 * torch.tanh(q @ k.mT / 50)).softmax(-1) @ v,
            "'tanh', and the pattern has 'matmul'",
        ),
        (
            lambda q, k, v, m: (lambda p: p @ v + p.sum())((q @ k.mT).softmax(-1)),
            "its value is also read by sum",
        ),
        (lambda q, k, v, m: (q @ k.mT).softmax(-2) @ v, "its dim is -2, and the pattern has axis -1"),
        (
            lambda q, k, v, m: (q @ k.mT).masked_fill(m < 0, -math.inf).softmax(-1) @ v,
            "masked scores are infinite",
        ),
        (lambda q, k, v, m: (q @ k[:, :1].mT).softmax(-1) @ v, "different numbers of heads"),
    ],
)
def test_what_is_another_attention_stays_and_says_why(function, why):
    base = attend(function)
    (planned,) = base.plan(of("fuse-attention")).passes
    assert not planned.sites
    assert [miss.reason for miss in planned.misses if why in miss.reason], [str(m) for m in planned.misses]
    with pytest.raises(PassError, match="its pattern is nowhere in this model; nearly at"):
        base.apply(of("fuse-attention"))


def test_dropout_becomes_the_ops_own_in_train_mode():
    class Drops(Attend):
        def forward(self, x, mask):
            self.function = lambda q, k, v, m: (
                nn.functional.dropout((q @ k.mT).softmax(-1), 0.5, self.training) @ v
            )
            return super().forward(x, mask)

    torch.manual_seed(0)
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 1, 5, 5)
    base = surgery.capture(Drops(None), (x, mask), {"x": {0: "batch"}, "mask": {0: "batch"}})
    fused = base.apply(of("fuse-attention"), freeze_base=False)
    module = fused.module()
    (node,) = [n for n in module.graph_module(training=True).graph.nodes if n.target is SDPA]
    assert node.args[4] == 0.5
    assert core(fused)[0].args[4] == 0
    module.train()
    runs = torch.stack([module(x, mask) for _ in range(400)])
    # Of 400 draws at p = ½ the mean is within 4 deviations of the value without: 4 / √400 of values of about one.
    assert (runs.mean(0) - module.eval()(x, mask)).abs().max() < 0.2
    assert runs.std(0).max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    base = attend(FORMS["softmax in fp32"] if dtype is torch.bfloat16 else FORMS["masked"], dtype=dtype)
    fused = base.apply(of("fuse-attention"))
    core(fused)
    # bf16: an ulp of a score (2^-8 of 4) moves a weight by as much; fp64: rounding alone.
    assert observe(base.run(), fused.run()).difference < (2e-2 if dtype is torch.bfloat16 else 1e-14)


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_roles_and_adapters_stay_on_real_models(name):
    base = program(name)
    fused = base.apply(of("fuse-attention"))
    assert len(fused.journal.entries[-1].sites) == len(base.view.attentions) == len(fused.view.attentions)
    assert [s.role for s in fused.sites] == [s.role for s in base.sites]
    adapted = fused.apply(surgery.Lora(target="attn.*", rank=2))
    assert observe(base.run(), adapted.run()).difference < 1e-5


def test_all_that_one_model_can_have_in_one_pipeline(tmp_path):
    base = program("llama")
    passes = [of(name) for name in ("fuse-qkv", "fuse-rmsnorm", "fuse-attention")]
    fused = base.apply(*passes, surgery.Lora(target="attn.qkv", rank=2))
    assert [e.pass_name for e in fused.journal] == [
        "fuse-qkv",
        "fuse-rmsnorm",
        "fuse-attention",
        "freeze",
        "lora",
    ]
    assert observe(base.run(), fused.run()).difference < 1e-5
    fused.save(tmp_path / "fused")
    assert observe(fused.run(), surgery.load(str(tmp_path / "fused"), base=base).run()).equal
    assert observe(fused.undo("fuse-attention").run(), fused.run()).difference < 1e-5
    assert observe(fused.undo_all().run(), base.run()).equal


def test_plan_says_why_on_the_command_line(tmp_path, monkeypatch, capsys):
    """In this process: starting one for each command takes longer than the command."""
    (tmp_path / "softcap.py").write_text(
        "import torch\nfrom tests.passes.fuse.test_fuse_attention import Attend\n"
        "def capped():\n"
        "    cap = lambda q, k, v, m: (50 * torch.tanh(q @ k.mT / 50)).softmax(-1) @ v\n"
        "    return Attend(cap), (torch.randn(3, 5, 16), torch.zeros(3, 1, 5, 5))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def said(*asked, code=0):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in asked])
        assert ended.value.code == code
        out, err = capsys.readouterr()
        return err if code else out

    asked = ("plan", "py:softcap:capped", "--pass", "fuse-attention")
    assert "its pattern is nowhere in this model; 1 near misses, which --why lists" in said(*asked)
    assert "at tanh: it is 'tanh', and the pattern has 'matmul' or 'bmm'" in said(*asked, "--why")
    (found,) = json.loads(said(*asked, "--why", "--json"))
    assert found["near_misses"][0]["node"] == "tanh"
    wrong = said("apply", *asked[1:], "-o", tmp_path / "out", code=2)
    assert wrong.splitlines()[-1].startswith(
        "error: fuse-attention: its pattern is nowhere in this model; nearly at"
    )


@pytest.mark.slow
def test_conformance():
    check_pass(of("fuse-attention"), program("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "whisper", "swin", "gpt_neox"])
def test_conformance_on_other_architectures(name):
    check_pass(of("fuse-attention"), program(name))
