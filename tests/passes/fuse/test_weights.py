"""fold-batchnorm, fuse-qkv and split-qkv: computed weights, undone, trained, refused, exported."""

from __future__ import annotations

import collections
import json

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from surgery.api import PassError
from surgery.api.programs import JournalError
from surgery.cli import main
from surgery.engine.contract.observe import observe
from surgery.passes.fuse.fold_batchnorm import fold
from surgery.testing import check_pass
from tests.conftest import minilm_path
from tests.shared.eager_attention import program
from tests.shared.models import attention, interleaved
from tests.techniques.catalogue import of

aten = torch.ops.aten


def ops_of(program, training=False):
    module = program.module()
    return collections.Counter(n.target for n in module.graph_module(training=training).graph.nodes)


def settled(net):
    """Give norms statistics and scales that differ from those of new norms."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias)
    return net


def net(before, after):
    return lambda: nn.Sequential(before(), after())


NETS = {
    "conv": (net(lambda: nn.Conv2d(3, 6, 3, bias=False), lambda: nn.BatchNorm2d(6)), (2, 3, 8, 8)),
    "grouped": (net(lambda: nn.Conv2d(4, 8, 3, groups=2, stride=2), lambda: nn.BatchNorm2d(8)), (2, 4, 9, 9)),
    "depthwise": (net(lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2), lambda: nn.BatchNorm2d(4)), (2, 4, 9, 9)),
    "padding by name": (net(lambda: nn.Conv2d(3, 6, 3, padding="same"), lambda: nn.BatchNorm2d(6)), (2, 3, 8, 8)),
    "no scale": (net(lambda: nn.Conv2d(3, 6, 1), lambda: nn.BatchNorm2d(6, affine=False)), (2, 3, 8, 8)),
    "1d": (net(lambda: nn.Conv1d(3, 6, 3), lambda: nn.BatchNorm1d(6)), (2, 3, 8)),
    "3d": (net(lambda: nn.Conv3d(3, 6, 3), lambda: nn.BatchNorm3d(6)), (2, 3, 5, 5, 5)),
    "linear": (net(lambda: nn.Linear(5, 6), lambda: nn.BatchNorm1d(6)), (4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("form", list(NETS))
def test_a_norm_is_folded_into_what_is_before_it(form):
    make, shape = NETS[form]
    torch.manual_seed(0)
    net = settled(make()).eval()
    x = torch.randn(shape)
    base = surgery.capture(net, (x,), {"input": {0: "batch"}})
    folded = base.apply(of("fold-batchnorm"), freeze_base=False)
    assert aten.batch_norm.default not in ops_of(folded)
    # Sums of at most a hundred fp32 products of size one.
    torch.testing.assert_close(folded.run(), net(x), atol=1e-5, rtol=0)
    assert set(folded.tensors) == {"0.fold-batchnorm.weight", "0.fold-batchnorm.bias"}
    before, after = base.count_parameters(), folded.count_parameters()
    gone = sum(p.numel() for p in net[1].parameters())
    added = 0 if net[0].bias is not None else net[0].weight.shape[0]
    assert after[0] == before[0] - gone + added


def test_the_fold_is_the_formula():
    torch.manual_seed(0)
    held = {n: torch.rand(3) + 0.5 for n in ("bias", "scale", "shift", "mean", "variance")}
    held["weight"] = torch.randn(3, 2)
    x = torch.randn(7, 2, dtype=torch.float64)
    wide = {n: t.double() for n, t in held.items()}
    norm = functional.batch_norm(
        functional.linear(x, wide["weight"], wide["bias"]),
        wide["mean"],
        wide["variance"],
        wide["scale"],
        wide["shift"],
    )
    made = fold(1e-5, held)
    torch.testing.assert_close(functional.linear(x, made["weight"], made["bias"]), norm, atol=1e-12, rtol=0)


class Reads(nn.Module):
    """A convolution whose value is read twice, and one that two places use."""

    def __init__(self, shared):
        super().__init__()
        self.conv, self.norm, self.shared = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), shared

    def forward(self, x):
        if self.shared:
            return self.norm(self.conv(x)) + self.conv(x * 2).mean()
        h = self.conv(x)
        return self.norm(h) + h.mean()


def test_what_cannot_be_folded_says_why():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(PassError, match=r"its value is also read by mean, outside of the pattern"):
        surgery.capture(Reads(False), (x,)).apply(of("fold-batchnorm"))
    with pytest.raises(PassError, match=r"conv\.weight serves several calls of its layer; .* untie --calls"):
        surgery.capture(Reads(True), (x,)).apply(of("fold-batchnorm"))
    unstored = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(PassError, match="its pattern is nowhere in this model"):
        surgery.capture(unstored, (x,)).apply(of("fold-batchnorm"))
    broken = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    broken[1].running_var.fill_(float("nan"))
    with pytest.raises(
        PassError, match="its running variance plus eps is not positive everywhere; fix the model"
    ):
        surgery.capture(broken, (x,)).apply(of("fold-batchnorm"))


def test_in_train_mode_the_statistics_are_held():
    torch.manual_seed(0)
    net = settled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    x = torch.randn(4, 3, 8, 8)
    folded = surgery.capture(net.eval(), (x,)).apply(of("fold-batchnorm"), freeze_base=False)
    module = folded.module().train()
    torch.testing.assert_close(module(x), net.eval()(x), atol=1e-5, rtol=0)
    module(x).square().mean().backward()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == set(folded.tensors)
    assert "1.running_mean" not in dict(module.named_buffers())
    assert torch.equal(folded.undo("fold-batchnorm").state()["1.running_mean"], net[1].running_mean)


def test_lora_stands_on_the_folded_convolution_and_onnx_has_no_norm(tmp_path):
    base = program("timm:resnet18")
    adapted = base.apply(surgery.Lora(target="layer1.0.conv1", rank=2), of("fold-batchnorm"))
    assert [e.pass_name for e in adapted.journal] == ["fold-batchnorm", "freeze", "lora"], "put into order"
    assert adapted.journal.entries[-1].sites[0].path == "layer1.0.conv1.fold-batchnorm"
    late = base.apply(surgery.Lora(target="layer1.0.conv1", rank=2))
    (planned,) = late.plan(of("fold-batchnorm")).passes
    assert len(planned.sites) == 19
    assert any(m.path == "layer1.0.bn1" for m in planned.misses)
    report = adapted.merge().export(tmp_path / "folded.onnx")
    counts = collections.Counter(n.op_type for n in onnx.load(tmp_path / "folded.onnx").graph.node)
    assert (counts["Conv"], counts["BatchNormalization"]) == (20, 0)
    assert report.parity.error < 1e-4


@pytest.mark.parametrize(("name", "count", "heights"), [("llama", 2, 64), ("bert", 2, 96), ("t5", 6, 96)])
def test_three_become_one_and_three_again(name, count, heights):
    base = program(name)
    fused = base.apply(of("fuse-qkv"))
    entry = fused.journal.entries[-1]
    assert len(entry.sites) == count
    assert next(s for s in fused.sites if s.role == "attn.qkv").shape[0] == heights
    assert {s.role for s in fused.sites} & {"attn.q", "attn.k", "attn.v"} == (
        {"attn.q"} if name == "t5" else set()
    )
    assert observe(base.run(), fused.run()).difference < 1e-5
    again = fused.apply(of("split-qkv"))
    kinds = ("attn.q", "attn.k", "attn.v")
    for role in kinds:
        old = [base.state()[s.weight] for s in base.sites if s.role == role]
        new = [again.state()[s.weight] for s in again.sites if s.role == role]
        assert len(old) == len(new)
        assert sum(t.numel() for t in old) == sum(t.numel() for t in new)
        if name != "t5":
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert observe(base.run(), again.run()).difference < 1e-5
    assert base.count_parameters() == fused.count_parameters() == again.count_parameters()


def test_what_the_fused_weight_learned_is_what_is_split():
    fused = program("bert").apply(of("fuse-qkv"))
    with torch.no_grad():
        for tensor in fused.tensors.values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    apart = fused.apply(of("split-qkv"))
    assert observe(fused.run(), apart.run()).difference < 1e-5
    assert observe(program("bert").run(), apart.run()).difference > 1e-3
    undone = apart.undo("split-qkv")
    assert observe(undone.run(), fused.run()).equal
    assert observe(undone.undo("fuse-qkv").run(), program("bert").run()).equal
    with pytest.raises(JournalError, match=r"'split-qkv' depends on .*fuse-qkv.* undo 'split-qkv' first"):
        apart.undo("fuse-qkv")
    assert observe(apart.without("fuse-qkv").run(), program("bert").run()).equal, "and the split with it"


def test_a_missing_bias_is_zero_beside_others():
    base = program("whisper")  # its keys have no bias
    fused = base.apply(of("fuse-qkv"))
    names = [n for n in fused.tensors if n.endswith("bias")]
    assert names
    assert all(not fused.tensors[n][32:64].any() for n in names if fused.tensors[n].numel() == 96)
    assert observe(base.run(), fused.run()).difference < 1e-5


@pytest.mark.parametrize("make", [attention, interleaved])
def test_rows_that_are_interleaved_come_back_in_their_order(make):
    module, inputs = make()
    base = surgery.capture(module, inputs, {"x": {0: "batch", 1: "seq"}})
    apart = base.apply(of("split-qkv"))
    assert observe(base.run(), apart.run()).difference < 1e-5
    decided = apart.journal.entries[-1].sites[0].decided["parts"]
    rows = {name: [r for a, b in runs for r in range(a, b)] for name, runs in decided.items()}
    assert sorted(r for own in rows.values() for r in own) == list(range(24))
    assert ("project.split-qkv.order" in apart.tensors) is (make is interleaved)
    only = apart.apply(surgery.Lora(target="attn.q", rank=2))
    assert [r.path for r in only.journal.entries[-1].sites] == ["project.split-qkv.q"]


@pytest.mark.slow
def test_gpt2_reads_the_parts_in_the_place_of_its_split(tmp_path):
    base = program("gpt2")
    apart = base.apply(of("split-qkv"))
    counts = ops_of(apart)
    assert aten.split.Tensor not in counts
    assert aten.cat.default not in counts
    assert counts[aten.addmm.default] == ops_of(base)[aten.addmm.default] + 4
    assert apart.export(tmp_path / "apart.onnx").parity.error < 1e-5
    # The parts are addmm, which fuse-qkv does not stack.
    planned = apart.plan(of("fuse-qkv")).passes[-1]
    assert not planned.accepted


def test_adapters_come_after_and_shared_weights_stay():
    base = program("llama")
    adapted = base.apply(surgery.Lora(target="attn.q", rank=2))
    (planned,) = adapted.plan(of("fuse-qkv")).passes
    assert {p.refusal for p in planned.sites} == {
        "it carries 'lora', which was made for the original op; apply fuse-qkv before adapters"
    }
    both = base.apply(surgery.Lora(target="attn.q", rank=2), of("fuse-qkv"))
    assert [e.pass_name for e in both.journal] == ["fuse-qkv", "freeze", "lora"]
    assert both.journal.entries[-1].sites[0].decided.get("rows"), "LoRA on the part of the fused weight"
    shared = program("albert").plan(of("fuse-qkv")).passes[-1]
    assert not shared.accepted
    assert all("its own copy with --pass untie --calls" in p.refusal for p in shared.refused)


@pytest.mark.parametrize(
    ("name", "pass_name"),
    [
        pytest.param("timm:resnet18", "fold-batchnorm", marks=pytest.mark.slow),
        ("bert", "fuse-qkv"),
        ("gpt2", "split-qkv"),
    ],
)
def test_conformance(name, pass_name):
    check_pass(of(pass_name), program(name), checks=_QUICK)


_QUICK = (
    "numerics",
    "untouched",
    "inserted",
    "effect",
    "second",
    "weights",
    "undo",
    "reload",
    "gradients",
    "held",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pass_name"),
    [
        ("timm:resnet18", "fold-batchnorm"),
        ("timm:efficientnet_b0", "fold-batchnorm"),
        ("regnet", "fold-batchnorm"),
        ("bert", "fuse-qkv"),
        ("llama", "fuse-qkv"),
        ("t5", "fuse-qkv"),
        ("gpt2", "split-qkv"),
        ("gpt_neox", "split-qkv"),
        ("timm:vit_tiny_patch16_224", "split-qkv"),
    ],
)
def test_conformance_whole(name, pass_name):
    check_pass(of(pass_name), program(name))


def test_plan_for_machines(capsys):
    """Sizes that are not fixed are null; a site of several ops has no call count."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", f"hf:{minilm_path()}", "--pass", "fuse-qkv", "--json"])
    assert ended.value.code == 0
    (planned,) = json.loads(capsys.readouterr().out)
    assert [site["shape"] for site in planned["sites"]] == [[None, None, 384]] * 6
