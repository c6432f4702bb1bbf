"""prune-filters: groups, remaining sizes and outputs; refusals, training, export, and adapters on top."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import surgery
from surgery.api import PassError
from surgery.api.programs import make_plugin_manager
from surgery.capture import trace
from surgery.engine.base import Base
from surgery.graph.graphs import flat_inputs
from surgery.passes.prune.plan import kept_atoms
from surgery.passes.prune.sweep import coupling_of
from surgery.testing import check_pass
from tests import torchvision_without_ops  # noqa: F401  (timm imports torchvision)
from tests.shared.models import attention, convnet, interleaved
from tests.zoo.zoo import build

CHEAP = (
    "numerics",
    "untouched",
    "inserted",
    "effect",
    "second",
    "weights",
    "undo",
    "gradients",
    "held",
    "input",
)
# The same products summed in another order: fp32 rounding over a few layers.
SAME = 2e-6


def program(name: str) -> surgery.Program:
    """A model of the zoo: random weights, full architecture, small."""
    loaded = build(name)
    return surgery.Program(Base(loaded, trace(loaded), make_plugin_manager()))


def masked(base: surgery.Program, pruned: surgery.Program) -> Any:
    """Outputs of the whole program with every removed channel set to zero where it is computed."""
    run = coupling_of(base.view)
    keep = kept_atoms(run, [SimpleNamespace(decided=r.decided) for r in pruned.journal.entries[-1].sites])
    nodes = {node.name: node for node in base.graph.nodes}

    class Masked(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            for label in run.labels.get(nodes[n.name], ()) if isinstance(value, Tensor) else ():
                value = torch.where(keep[label], value, torch.zeros((), dtype=value.dtype))
            return value

    module, (args, kwargs) = base.graph_module, base.example_inputs
    with torch.no_grad():
        return Masked(module).run(*flat_inputs(module, args, kwargs), enable_io_processing=False)


def difference(a: Any, b: Any) -> float:
    """Largest difference of all outputs, over the scale of a."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


def sites(pruned: surgery.Program) -> dict[str, dict[str, Any]]:
    return {record.path: dict(record.decided) for record in pruned.journal.entries[-1].sites}


def mlp(width: int = 8) -> surgery.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, 5))
    return surgery.capture(net, (torch.randn(4, 6),))


def removed_rows(decided: dict[str, Any], name: str, axis: int = 0) -> list[int]:
    known = next(t for t in decided["tensors"] if t["name"] == name)
    return decided["removed"][known["removed"][str(axis)]]


# -- the algebra


def test_the_least_neurons_go():
    base = mlp()
    pruned = base.apply(surgery.PruneFilters(ratio=0.5))
    up, down = base.state()["0.weight"].detach(), base.state()["2.weight"].detach()
    worth = up.abs().sum(1) / up.abs().sum(1).mean() + down.abs().sum(0) / down.abs().sum(0).mean()
    left = worth.topk(4).indices.sort().values
    assert torch.equal(pruned.tensors["0.prune-filters.weight"], up[left])
    assert torch.equal(pruned.tensors["0.prune-filters.bias"], base.state()["0.bias"][left])
    assert torch.equal(pruned.tensors["2.prune-filters.weight"], down[:, left])
    assert difference(masked(base, pruned), pruned.run()) <= SAME
    (x,), _ = base.example_inputs
    hidden = F.gelu(F.linear(x, up[left], base.state()["0.bias"][left]))
    torch.testing.assert_close(pruned.run(), F.linear(hidden, down[:, left], base.state()["2.bias"]))


def test_importances_rank_otherwise():
    """l2 by hand; taylor measures the effect on the outputs, so a neuron that is always off is removed first."""
    base = mlp()
    up, down = base.state()["0.weight"].detach(), base.state()["2.weight"].detach()
    squares = (
        up.square().sum(1) / up.square().sum(1).mean() + down.square().sum(0) / down.square().sum(0).mean()
    )
    pruned = base.apply(surgery.PruneFilters(ratio=0.25, importance="l2"))
    assert removed_rows(sites(pruned)["0"], "0.weight") == sorted(
        squares.topk(2, largest=False).indices.tolist()
    )

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    with torch.no_grad():
        net[0].bias[3] = -100.0
        net[0].weight[3] *= 3
        net[2].weight[:, 3] *= 3
    base = surgery.capture(net, (torch.randn(16, 6),))
    for importance, first in (("l1", False), ("taylor", True)):
        pruned = base.apply(surgery.PruneFilters(ratio=0.125, importance=importance))
        assert (removed_rows(sites(pruned)["0"], "0.weight") == [3]) == first


def test_grouped_queries_go_with_their_keys():
    base = program("llama")
    pruned = base.apply(surgery.PruneFilters(ratio=0.5, target="attn.*"))
    known = sites(pruned)
    assert {path.rsplit(".", 1)[1] for path in known} == {"q_proj"}
    for path, decided in known.items():
        owner = path.removesuffix("q_proj")
        (head,) = {row // 8 for row in removed_rows(decided, f"{owner}k_proj.weight")}
        keys = list(range(8 * head, 8 * head + 8))
        queries = list(range(16 * head, 16 * head + 16))  # two query heads to one of keys
        assert removed_rows(decided, f"{owner}k_proj.weight") == keys
        assert removed_rows(decided, f"{owner}v_proj.weight") == keys
        assert removed_rows(decided, f"{owner}q_proj.weight") == queries
        assert removed_rows(decided, f"{owner}o_proj.weight", 1) == queries
    assert difference(masked(base, pruned), pruned.run()) <= SAME


@pytest.mark.parametrize("make", [attention, interleaved])
def test_fused_projections_lose_whole_heads(make):
    base = surgery.capture(*make())
    pruned = base.apply(surgery.PruneFilters(ratio=0.5))
    rows = removed_rows(sites(pruned)["project"], "project.weight")
    assert len(rows) == 12
    assert difference(masked(base, pruned), pruned.run()) <= SAME


# -- what it computes: on every form of net, what the whole one does with the removed units at zero

EXACT = ("bert", "gpt2", "llama", "qwen3", "timm:vit_tiny_patch16_224", "timm:mobilenetv3_small_050")
SLOW = (
    "gpt_neox", "bloom", "falcon", "t5", "bart", "mixtral", "mamba", "qwen3_5", "deberta-v2",
    "timm:resnet18", "timm:swin_tiny_patch4_window7_224", "timm:convnext_atto", "timm:densenet121", "timm:regnety_002",
    "timm:efficientnet_b0",
)  # fmt: skip


@pytest.mark.parametrize("name", [*EXACT, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_it_computes_what_zeros_would(name):
    base = program(name)
    pruned = base.apply(surgery.PruneFilters(ratio=0.5))
    assert not pruned.reports[-1].plan.refused
    assert pruned.count_parameters()[0] < base.count_parameters()[0]
    # Deep nets of random weights: rounding grows from layer to layer.
    assert difference(masked(base, pruned), pruned.run()) <= (1e-4 if name in SLOW else SAME)


def test_a_size_that_depends_on_data_is_refused_by_name():
    """DeBERTa's projections of relative positions have a number of rows that is known at run time only."""
    with pytest.raises(
        PassError, match=r"cannot be pruned: the size \w+ depends on data; leave the weights before"
    ):
        program("deberta").apply(surgery.PruneFilters(ratio=0.5))


class Branches(nn.Module):
    """A residual of batch-normed convolutions, a depthwise one, groups, a concatenation, a shuffle, and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.gate = nn.Conv2d(32, 32, 1)
        self.project = nn.Conv2d(32, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.regroup = nn.GroupNorm(6, 12)
        self.turned = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.joined = nn.Conv2d(18, 8, 1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.silu(self.depthwise(self.expand(x)))
        y = y.view(y.shape[0], 2, 16, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        x = x + self.project(y)
        y = F.relu(self.regroup(self.grouped(x)))
        y = torch.cat([y, F.max_pool2d(self.turned(y), 2)], 1)
        y = F.adaptive_avg_pool2d(self.joined(y), 2)
        return self.head(y.flatten(1))


def branches() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    net = Branches()
    for norm in (net.norm, net.regroup):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return net.eval(), (torch.randn(2, 3, 8, 8),)


def test_every_group_by_itself():
    """One site at a time, and all together: each is correct alone."""
    base = surgery.capture(*branches())
    planned = base.plan(surgery.PruneFilters(ratio=0.5)).passes[-1]
    places = {plan.site.path: plan.site.decided for plan in planned.accepted}
    units = {path: [(g["units"], g["removed"]) for g in known["groups"]] for path, known in places.items()}
    assert units == {
        "stem": [(4, 2)],  # two channels each: the grouped convolution loses the same of both groups
        "expand": [(8, 4)],  # two each, with two depthwise filters to one, that the shuffle puts side by side
        "grouped": [(3, 1)],  # pairs, as the group norm has them, of both groups
        "turned": [(6, 3)],
        "joined": [(8, 4)],
    }
    for path in places:
        pruned = base.apply(surgery.PruneFilters(ratio=0.5, target=f"re:^{path}$"))
        assert difference(masked(base, pruned), pruned.run()) <= SAME, path
        saved = base.count_parameters()[0] - pruned.count_parameters()[0]
        assert saved == sites(pruned)[path]["saved"]["parameters"] > 0


def test_multiply_adds_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    def counted(of: surgery.Program) -> int:
        with FlopCounterMode(display=False) as counter:
            of.run()
        return counter.get_total_flops() // 2

    base = surgery.capture(*branches())
    for path in ("stem", "expand", "joined"):
        pruned = base.apply(surgery.PruneFilters(ratio=0.5, target=f"re:^{path}$"))
        assert counted(base) - counted(pruned) == sites(pruned)[path]["saved"]["macs"] > 0


class Uneven(nn.Module):
    """A projection whose halves have different users, and an attention of one head whose width is its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.a, self.b = nn.Linear(6, 16), nn.Linear(8, 4), nn.Linear(8, 4)
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fused(x).chunk(2, -1)
        x = self.a(F.relu(first)) * self.b(F.relu(second))
        mixed = F.scaled_dot_product_attention(*(make(x).unsqueeze(1) for make in (self.q, self.k, self.v)))
        return self.out(mixed.squeeze(1))


def test_ops_that_have_to_be_others():
    """A chunk becomes a split of two sizes; an attention still divides by the root of its original width."""
    torch.manual_seed(0)
    net = Uneven()
    with torch.no_grad():
        net.fused.weight[:6] *= 1e-3
        net.a.weight[:, :6] *= 1e-3
    base = surgery.capture(net, (torch.randn(2, 3, 6),))
    pruned = base.apply(surgery.PruneFilters(ratio=0.4, scope="global"))
    assert difference(masked(base, pruned), pruned.run()) <= SAME
    sizes = [n.args[1] for n in pruned.graph.nodes if "split_with_sizes" in str(n.target)]
    assert len(sizes) == 1
    assert sizes[0][0] < sizes[0][1]
    narrow = base.apply(surgery.PruneFilters(ratio=0.5, target="re:^[qk]$"))
    assert narrow.tensors["q.prune-filters.weight"].shape == (2, 4)
    assert difference(masked(base, narrow), narrow.run()) <= SAME
    assert check_pass(surgery.PruneFilters(ratio=0.4, scope="global"), base, checks=CHEAP).ok


# -- options


def test_round_to_keeps_multiples():
    pruned = mlp(32).apply(surgery.PruneFilters(ratio=0.4, round_to=8))
    assert pruned.tensors["0.prune-filters.weight"].shape == (24, 6)
    with pytest.raises(PassError, match=r"with --round-to 8, --ratio 0\.4 removes none of its 8 units"):
        mlp(8).apply(surgery.PruneFilters(ratio=0.4, round_to=8))


def test_ranked_together():
    """The one of two hidden layers with many idle units loses most of them, but keeps a tenth."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    with torch.no_grad():
        net[0].weight[:15] *= 1e-3
        net[2].weight[:, :15] *= 1e-3
    base = surgery.capture(net, (torch.randn(4, 6),))
    known = sites(base.apply(surgery.PruneFilters(ratio=0.375, scope="global")))
    assert [known[path]["groups"][0]["removed"] for path in ("0", "2")] == [15, 0]
    with torch.no_grad():
        net[0].weight[15:] *= 1e-3
        net[2].weight[:, 15:] *= 1e-3
    ranked = base.apply(surgery.PruneFilters(ratio=0.9, scope="global"))
    assert all(known["groups"][0]["removed"] <= 18 for known in sites(ranked).values())


def test_a_stream_goes_where_it_is_named():
    base = program("bert")
    inner = base.apply(surgery.PruneFilters(ratio=0.5))
    assert not any("embed" in path for path in sites(inner))
    whole = base.apply(surgery.PruneFilters(ratio=0.5, target="all"))
    assert sites(whole)["bert.embeddings.word_embeddings"]["groups"] == [
        {"what": "units", "units": 32, "rows": 1, "removed": 16}
    ]
    assert whole.run()["logits"].shape == base.run()["logits"].shape
    named = base.apply(surgery.PruneFilters(ratio=0.5, target="embed.token"))
    assert list(sites(named)) == ["bert.embeddings.word_embeddings"]


# -- refused


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.fft.fft(self.a(x)).real))


def test_refused_and_said():
    torch.manual_seed(0)
    base = surgery.capture(Odd(), (torch.randn(4, 6),))
    refused = {
        plan.site.path: plan.refusal
        for plan in base.plan(surgery.PruneFilters(target="all")).passes[-1].refused
    }
    assert "fft_fft in the model: no pruning rule for this op" in refused["a"]
    one = surgery.capture(nn.Sequential(OrderedDict(c=nn.Linear(6, 4))), (torch.randn(2, 6),))
    with pytest.raises(PassError, match=r"c: refused, its units cannot be removed: the model returns them"):
        one.apply(surgery.PruneFilters(target="c"))
    with pytest.raises(PassError, match=r"--ratio 0\.01 of its 8 units is less than one"):
        mlp().apply(surgery.PruneFilters(ratio=0.01))
    with pytest.raises(PassError, match=r"'lora'.*prune before it, or undo 'lora'"):
        mlp().apply(surgery.Lora(target="re:^0$", rank=2)).apply(surgery.PruneFilters(target="all"))
    broken = mlp()
    with torch.no_grad():
        broken.base.tensors["0.weight"][0, 0] = float("nan")
    with pytest.raises(PassError, match=r"0\.weight holds values that are not finite"):
        broken.apply(surgery.PruneFilters(ratio=0.5))
    for ratio in (0, 1, -0.5):
        with pytest.raises(PassError, match="--ratio"):
            surgery.PruneFilters.parse({"ratio": ratio})


def test_nothing_to_prune_is_one_sentence():
    net = nn.Linear(6, 4)
    with pytest.raises(PassError, match="no filters, neurons or heads"):
        surgery.capture(net, (torch.randn(2, 6),)).apply(surgery.PruneFilters())


# -- a program like any other


def test_the_kit_on_convolutions():
    report = check_pass(surgery.PruneFilters(ratio=0.5), surgery.capture(*branches()))
    assert set(report.skipped) == {"tied", "merge", "restored"}, report


@pytest.mark.slow
def test_the_kit_on_grouped_queries_with_the_stream():
    report = check_pass(surgery.PruneFilters(ratio=0.5, target="all"), program("llama"))
    assert {"untouched", "undo", "reload", "reexport", "unflatten", "gradients", "held", "onnx"} <= set(
        report.passed
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2", "bert", "t5", "timm:vit_tiny_patch16_224", "timm:mobilenetv3_small_050"]
)
def test_the_kit_on_more(name):
    assert check_pass(surgery.PruneFilters(ratio=0.5, importance="taylor"), program(name)).ok


@pytest.mark.slow
def test_the_file_holds_only_what_is_left(tmp_path):
    base = program("gpt2")
    pruned = base.apply(surgery.PruneFilters(ratio=0.5, target="all"))
    report = pruned.export(tmp_path / "model.onnx")
    assert report.parity.error <= 1e-5
    found = onnx.load(tmp_path / "model.onnx")
    held = sum(math.prod(t.dims) for t in found.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    # Besides the parameters a few constants: masks and scales.
    assert pruned.count_parameters()[0] <= held <= pruned.count_parameters()[0] + 200
    gathers = [node for node in found.graph.node if node.op_type == "Gather"]
    whole = {tuple(p.shape) for n, p in base.state().items() if n in base.names}
    shapes = {t.name: tuple(t.dims) for t in found.graph.initializer}
    assert not any(shapes.get(node.input[0]) in whole for node in gathers)


def test_saved_undone_and_left_out(tmp_path):
    base = program("llama")
    pruned = base.apply(surgery.PruneFilters(ratio=0.5))
    json.dumps(pruned.journal.to_json())
    before = base.run()["logits"]
    assert torch.equal(pruned.undo("prune-filters").run()["logits"], before)
    assert torch.equal(pruned.without("prune-filters").run()["logits"], before)


def test_adapters_and_codes_stand_on_what_is_left(tmp_path):
    base = program("llama")
    pruned = base.apply(surgery.PruneFilters(ratio=0.5, target="all"))
    adapted = pruned.apply(surgery.Lora(target="attn.*,mlp.*", rank=2), freeze_base=True)
    with torch.no_grad():
        for name, tensor in adapted.tensors.items():
            if ".lora." in name:
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(adapted.run()["logits"], pruned.run()["logits"])
    merged = adapted.merge()
    assert difference(adapted.run(), merged.run()) <= 1e-5
    assert {n for n, t in adapted.state().items() if t.requires_grad} == {
        n for n in adapted.tensors if "lora" in n
    }
    quantized = pruned.apply(surgery.Quantize(target="mlp.*", group=0))
    report = quantized.export(tmp_path / "model.onnx")
    assert report.parity.error <= 1e-5
    with pytest.raises(PassError, match="'quantize'"):
        quantized.apply(surgery.PruneFilters(target="mlp.*", label="again", ratio=0.5))


class Digits(nn.Module):
    """A small residual net."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1),
            nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.block(x) + x)
        return self.head(F.adaptive_max_pool2d(x, 2).flatten(1))


def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((module(x).argmax(1) == y).float().mean())


def trained(module: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimiser.zero_grad()
            F.cross_entropy(module(x[batch]), y[batch]).backward()
            optimiser.step()
    module.eval()


def test_digits_are_read_again_after_fine_tuning(tmp_path):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    torch.manual_seed(0)
    net = Digits()
    trained(net, x[:1300], y[:1300], 6)
    base = surgery.capture(net, (x[:4],), {"x": {0: "batch"}})
    before = accuracy(base.module(), x[1300:], y[1300:])
    assert before >= 0.9
    pruned = base.apply(surgery.PruneFilters(ratio=0.5, importance="taylor"), data=[((x[:256],), {})])
    assert pruned.count_parameters()[0] < 0.45 * base.count_parameters()[0]
    fallen = accuracy(pruned.module(), x[1300:], y[1300:])
    trained(pruned.module(), x[:1300], y[:1300], 4)
    after = accuracy(pruned.module(), x[1300:], y[1300:])
    assert fallen < after
    assert after >= before - 0.03  # 15 of 497 images
    pruned.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"), base=base)
    assert torch.equal(again.run(x[1300:1400]), pruned.run(x[1300:1400]))
    undone, first = pruned.undo("prune-filters").state(), base.state()
    cut = {name for record in pruned.journal.find("prune-filters")[0].sites for name in record.tensors}
    assert set(undone) - cut == {"head.bias"} | {n for n in undone if n.endswith("num_batches_tracked")}
    assert all(torch.equal(undone[name], first[name]) for name in cut)
    # No channel of these was cut: they are the base's own, and what was learnt of them stays, as after any undo.
    trained_on = pruned.state()
    assert torch.equal(undone["head.bias"], trained_on["head.bias"])
    assert not torch.equal(undone["head.bias"], first["head.bias"])


def test_together_in_one_pipeline():
    """Layers that adapters attach to are created first, in any given order."""
    made = mlp().apply(surgery.Lora(target="all-linear", rank=2), surgery.PruneFilters(ratio=0.5))
    assert [e.pass_name for e in made.journal if e.kind == "rewrite"] == ["prune-filters", "lora"]
    assert made.tensors["0.prune-filters.lora.B"].shape == (4, 2)


def test_train_mode_keeps_statistics_of_what_is_left():
    base = surgery.capture(*convnet())
    pruned = base.apply(surgery.PruneFilters(ratio=0.5))
    module = pruned.module().train()
    before = pruned.tensors["1.prune-filters.running_mean"].clone()
    module(torch.randn(6, 3, 8, 8)).square().mean().backward()
    assert not torch.equal(pruned.tensors["1.prune-filters.running_mean"], before)
    assert before.shape == (4,)
    assert all(p.grad is not None for n, p in module.named_parameters() if "prune-filters" in n)
