"""low-rank: truncated SVD on every form of weight, reported errors, size and speed, undo and refusals."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import PassError
from surgery.graph.marks import mark_of
from surgery.testing import check_pass
from tests.shared import models

# Factors are computed in fp64 and rounded to fp32 once, against an SVD in fp64 rounded once: a few ulp per op.
ROUNDING = 5e-6


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def _trained(program: surgery.Program) -> set[str]:
    return {n for n, p in program.module().named_parameters() if p.requires_grad}


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]).to(matrix.dtype)


class Every(nn.Module):
    """Every form that can be factored: W x, x W, addmm, matmul, grouped and strided convolutions, lookups, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.linear = nn.Linear(8, 12)
        self.addmm = nn.Parameter(torch.randn(12, 8))
        self.addmm_bias = nn.Parameter(torch.randn(8))
        self.matmul = nn.Parameter(torch.randn(8, 8))
        self.column = nn.Parameter(torch.randn(8, 8))
        self.conv1 = nn.Conv1d(8, 16, 3, padding="same", groups=2)
        self.conv2 = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.router = nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(4, 10, 16))
        self.down = nn.Parameter(torch.randn(4, 10, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.embed(ids))
        x = torch.addmm(self.addmm_bias, x.view(-1, 12), self.addmm).view(*ids.shape, 8)
        x = torch.matmul(x, self.matmul) + torch.matmul(self.column, x.transpose(1, 2)).transpose(1, 2)
        y = self.conv1(x.transpose(1, 2)).transpose(1, 2)
        image = self.conv2(x.unsqueeze(1)).mean((2, 3))
        flat = y.reshape(-1, 16)
        best = torch.arange(flat.shape[0]) % 4
        hidden = torch.bmm(self.up[best], flat.unsqueeze(-1)).squeeze(-1)
        flat = torch.bmm(hidden.unsqueeze(1), self.down[best]).squeeze(1)
        return flat.view(*ids.shape, 16).sum(-1) + image.sum(1, keepdim=True)


TARGET = "embed,linear,addmm,matmul,column,conv1,conv2,up,down"


def every() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Every(), (torch.randint(0, 20, (3, 6)),)


def test_factors_are_the_truncated_svd():
    """The factored program against the model with weights truncated by torch.linalg.svd to that rank."""
    module, inputs = every()
    base = surgery.capture(module, inputs)
    program = base.apply(surgery.LowRank(target=TARGET, rank=2))
    assert len(program.journal.entries[-1].sites) == 9
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for weight in (
            twin.linear.weight,
            twin.addmm,
            twin.matmul,
            twin.column,
            twin.embed.weight,
            twin.up,
            twin.down,
        ):
            weight.copy_(truncated(weight, 2))
        for weight, groups in ((twin.conv1.weight, 2), (twin.conv2.weight, 1)):
            rows = weight.reshape(groups, weight.shape[0] // groups, -1)
            weight.copy_(truncated(rows, 2).view_as(weight))
    assert gap(program.run(), twin(*inputs)) < ROUNDING
    assert gap(program.run(), base.run()) > 1e-2
    other = (torch.randint(0, 20, (3, 6)),)
    assert gap(program.run(*other), twin(*other)) < ROUNDING


@pytest.mark.parametrize("basis", ["weight", "outputs"])
def test_stated_errors_are_the_measured_ones(basis):
    """`error` is the weight's error, `output_error` that of the op's outputs on the data, at every kind of site."""
    module, inputs = every()
    base = surgery.capture(module, inputs)
    data = [((torch.randint(0, 20, (3, 6)),), {}) for _ in range(4)]
    pass_ = surgery.LowRank(target=TARGET, rank=2, basis=basis)
    weighted = surgery.LowRank(target=TARGET, budget=0.3, basis=basis)
    for chosen in (pass_, weighted):
        for planned in base.plan(chosen, data=data).passes[-1].accepted:
            site, decided = planned.site, planned.site.decided
            alone = base.apply(
                surgery.LowRank(target=f"re:^{site.path}$", rank=decided["rank"], basis=basis), data=data
            )
            entry = alone.journal.entries[-1].sites[0]
            assert entry.decided["error"] == decided["error"]
            if "output_error" in decided:
                errors, sizes = [], []
                node = site.calls[0].node
                factored = next(
                    n for n in alone.graph.nodes if n.name == mark_of(alone.view.node(node.name)).wrapped_by
                )
                for args, _ in data:
                    was = surgery.api.Probe(base, [(args, {})]).values([node])[node.name][0]
                    now = surgery.api.Probe(alone, [(args, {})]).values([factored])[factored.name][0]
                    errors.append((now - was).norm() ** 2)
                    bias = base.base.tensors.get(site.bias or "")
                    if bias is not None and site.kind == "conv":
                        bias = bias.reshape(-1, *(1 for _ in site.shape[2:]))
                    sizes.append((was - (bias if bias is not None else 0)).norm() ** 2)
                measured = float((sum(errors) / sum(sizes)).detach() ** 0.5)
                assert measured == pytest.approx(decided["output_error"], rel=1e-3, abs=1e-5), site.path


def test_a_budget_takes_the_smallest_rank_within_it_and_outputs_beat_the_weight():
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    data = [((torch.randn(3, 5, 8) @ torch.diag(torch.logspace(0, -3, 8)),), {}) for _ in range(8)]

    def decided(**options):
        plan = base.plan(surgery.LowRank(target="project", **options), data=data)
        return plan.passes[-1].sites[0].site.decided

    by_outputs = decided(budget=0.2)
    assert by_outputs["output_error"] <= 0.2
    below = decided(rank=by_outputs["rank"] - 1, basis="outputs")
    assert below["output_error"] > 0.2
    by_weight = decided(budget=0.6, basis="weight")
    assert by_weight["output_error"] <= 0.6
    same = decided(rank=by_weight["rank"], basis="outputs")
    assert same["output_error"] < by_weight["output_error"]
    assert same["error"] > by_weight["error"]
    kept = decided(energy=0.8)
    values = torch.linalg.svdvals(module.project.weight.double()) ** 2
    share = (values.cumsum(0) / values.sum()).tolist()
    assert kept["rank"] == next(r for r, s in enumerate(share, 1) if s >= 0.8)


def test_the_weight_is_neither_run_nor_counted_nor_exported(tmp_path):
    module, inputs = every()
    base = surgery.capture(module, inputs)
    program = base.apply(surgery.LowRank(target="path:linear,conv1", rank=2))
    compiled = {str(n.target) for n in program.module().graph_module().graph.nodes}
    assert "linear.low-rank.A" in compiled
    assert {"linear.weight", "conv1.weight"}.isdisjoint(compiled)
    assert {"linear.bias", "conv1.bias"} <= compiled
    assert {"linear.weight", "conv1.weight"} <= {str(n.target) for n in program.graph.nodes}
    saved = 12 * 8 - 2 * (12 + 8) + 16 * 4 * 3 - 2 * (2 * 4 * 3 + 16)
    assert base.count_parameters()[0] - program.count_parameters()[0] == saved
    plan = base.plan(surgery.LowRank(target="path:linear,conv1", rank=2)).passes[-1]
    assert plan.freed == {"linear.weight", "conv1.weight"}
    names = {n for group in program.parameter_groups() for n in group["names"]}
    assert "linear.low-rank.B" in names
    assert "linear.weight" not in names
    program.export(tmp_path / "m.onnx")
    held = [
        t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    ]
    shapes = [tuple(t.dims) for t in held]
    assert shapes.count((12, 8)) + shapes.count((8, 12)) == 1  # addmm's
    assert (16, 4, 3) not in shapes


def test_lora_on_top_stays_and_each_goes_alone(randomise):
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    low_rank, sparse = surgery.LowRank(target="out", rank=2), surgery.SparseTune(target="project", count=4)
    factored = base.apply(low_rank, sparse)
    program = factored.apply(surgery.Lora(target="out,project", rank=2))
    assert torch.equal(program.run(), factored.run())
    adapted = {f"{site}.lora.{n}" for site in ("out", "project") for n in "AB"}
    assert _trained(program) == adapted | {"project.sparse-tune.values"}
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if "lora" in name:
                tensor.normal_()
    assert gap(program.run(), factored.run()) > 1e-2
    merged = program.merge()
    kept = merged.journal.entries[-1].options["kept"]
    assert merged.journal.entries[-1].options["folded"] == ["sparse-tune"]
    assert kept["low-rank"] == "low-rank has no merged form; export to ONNX, or save the program"
    assert "low-rank has replaced out.weight" in kept["lora"]
    dense = program.without("low-rank")
    alone = base.apply(surgery.Lora(target="out,project", rank=2))
    with torch.no_grad():
        for name, tensor in alone.tensors.items():
            tensor.copy_(program.tensors[name])
    assert torch.equal(dense.run(), alone.run())
    assert torch.equal(dense.undo("lora").run(), base.run())
    assert dense.merge().journal.entries[-1].options["folded"] == ["sparse-tune", "lora"]
    assert torch.equal(program.undo("low-rank").undo("sparse-tune").run(), alone.run())


def test_both_factors_learn_and_nothing_frozen_moves():
    """Digits: the factored network is trained back to what the dense one knew."""
    torch.manual_seed(0)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:600], dtype=torch.float32) / 16
    y = torch.tensor(labels[:600])
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    base = surgery.capture(net, (x[:4],), dynamic={"input": {0: "batch"}})
    program = base.apply(surgery.LowRank(target="0", rank=4), surgery.Freeze(target="2"))
    module = program.module().train()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    losses = []
    optimiser = torch.optim.Adam(program.parameter_groups(5e-3)[0]["params"], 5e-3)
    for _ in range(40):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    moved = {n for n, t in module.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"0.low-rank.A", "0.low-rank.B", "0.bias"}
    assert torch.equal(program.undo("low-rank").module().state_dict()["0.weight"], net[0].weight)


def test_a_tied_embedding_is_factored_once_the_output_layer_has_a_copy():
    module, inputs = models.forms()
    base = surgery.capture(module, inputs)
    with pytest.raises(PassError, match=r"low-rank at embed: refused, embed.weight is read .* --pass untie"):
        base.apply(surgery.LowRank(target="embed", rank=2))
    program = base.apply(surgery.Untie(target="head"), surgery.LowRank(target="embed", rank=2))
    assert base.count_parameters()[0] + 11 * 8 - 11 * 8 + 2 * (11 + 8) == program.count_parameters()[0]


@pytest.mark.parametrize(
    ("options", "before", "message"),
    [
        ({"rank": 6}, (), r"low-rank at out: refused, rank 6, which takes 96 values, .* has 64; it saves up to rank 3"),
        ({"energy": 0.99}, (), r"refused, --energy 0.99 asks for rank \d"),
        ({"budget": 0.001}, (), r"refused, --budget 0.001 asks for rank \d"),
        ({"rank": 2}, (surgery.Lora(target="out"),), r"it carries 'lora', .*; factor first, then apply the adapter"),
        ({"rank": 2}, (surgery.SparseTune(target="out"),), r"'sparse-tune' changes its weight; undo that"),
        ({"rank": 2, "as": "b"}, (surgery.LowRank(target="out", rank=3),), r"'low-rank' has put another op in its"),
    ],
)  # fmt: skip
def test_refused(options, before, message):
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    program = base.apply(*before) if before else base
    with pytest.raises(PassError, match=message):
        program.apply(surgery.LowRank.parse({"target": "out", **options}))


def test_one_pipeline_factors_first_and_plans_what_it_applies():
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    both = surgery.Lora(target="out", rank=2), surgery.LowRank(target="out", rank=2)
    program = base.apply(*both)
    assert [e.id for e in program.journal] == ["low-rank", "freeze", "lora"]
    assert _trained(program) == {"out.lora.A", "out.lora.B"}
    assert [p.pass_.name for p in base.plan(*both).passes] == ["low-rank", "freeze", "lora"]
    again = surgery.LowRank(target="out", rank=2), surgery.LowRank(target="out", rank=2, label="again")
    (refused,) = base.plan(*again).passes[-1].refused
    assert "'low-rank' has put another op in its place" in str(refused.refusal)


def test_sparse_tune_on_factors_and_bad_options_are_refused():
    module, inputs = models.attention()
    program = surgery.capture(module, inputs).apply(surgery.LowRank(target="out", rank=2))
    with pytest.raises(
        PassError, match=r"sparse-tune at out: refused, 'low-rank' has put another op in its place"
    ):
        program.apply(surgery.SparseTune(target="out"))
    with pytest.raises(
        PassError, match=r"give one of --rank, --energy and --budget; it has --rank and --budget"
    ):
        surgery.LowRank.parse({"rank": "2", "budget": "0.1"})
    with pytest.raises(PassError, match=r"it has none"):
        surgery.LowRank.parse({"target": "out"})
    transposed = surgery.capture(nn.ConvTranspose1d(4, 4, 3), torch.randn(2, 4, 5))
    with pytest.raises(PassError, match="a transposed convolution is not factored"):
        transposed.apply(surgery.LowRank(target="all", rank=1))


def test_half_precision():
    module, inputs = models.attention()
    base = surgery.capture(module.to(torch.bfloat16), tuple(x.to(torch.bfloat16) for x in inputs))
    program = base.apply(surgery.LowRank(target="all", rank=3))
    assert program.tensors["out.low-rank.A"].dtype == torch.bfloat16
    assert program.run().dtype == torch.bfloat16


def test_kit_on_every_form():
    report = check_pass(surgery.LowRank(target=TARGET, rank=2), surgery.capture(*every()))
    print(report)
    assert set(report.skipped) == {"tied", "second", "merge", "restored"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["minilm", "smollm2", "t5", "vit", "resnet18", "wav2vec2", "mixtral", "mamba"]
)
@pytest.mark.parametrize("options", [{"rank": 2}, {"budget": 0.5}], ids=["rank", "budget"])
def test_kit_on_models(name, options):
    from tests.techniques.models import program

    target = {"resnet18": "conv", "mamba": "all-linear"}.get(name, "attn.*,mlp.*")
    report = check_pass(surgery.LowRank(target=target, **options), program(name))
    print(report)
    assert set(report.skipped) <= {"tied", "second", "merge", "restored"}


def test_freezing_what_it_made_is_no_fault_of_the_next_pass():
    """torch multiplies a transposed view differently if the weight is frozen; lora is compared with that result."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.l, self.o = (
                nn.Conv1d(8, 8, 3, padding=1),
                nn.Linear(8, 8, bias=False),
                nn.Linear(8, 3),
            )

        def forward(self, x):
            return self.o(self.l(self.conv(x).transpose(1, 2)))

    factored = surgery.capture(Net(), torch.randn(3, 8, 5)).apply(surgery.LowRank(target="l", rank=2))
    adapted = factored.apply(surgery.Lora(target="o", rank=2))
    assert [e.numerics["observed"] for e in adapted.journal][1:] == ["bit for bit"] * 2
