"""rsLoRA, DoRA, PiSSA and LoRA dropout: the papers' algebra, the graphs, compositions and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch_surgery_ia3 import IA3

import surgery
from surgery.cli import main
from surgery.common.errors import PassError
from surgery.engine.contract.observe import observe
from surgery.passes.lora.pissa import PISSA_MOVES
from surgery.testing import CHECKS, check_pass
from tests.shared import models
from tests.techniques.models import program as real

aten = torch.ops.aten
# Two orders of summation of a few dozen fp32 products, and a norm with a root: units in the last place.
ROUNDING = 5e-6
CHEAP = [name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx")]
VARIANTS = {
    "rslora": {"rslora": True},
    "gaussian": {"init": "gaussian"},
    "dropout": {"dropout": 0.3},
    "dora": {"dora": True},
    "dora, full gradient": {"dora": True, "full_gradient": True},
    "dora, dropout": {"dora": True, "dropout": 0.3},
    "pissa": {"init": "pissa", "rank": 1},
    "pissa, randomised": {"init": "pissa", "rank": 1, "svd_iterations": 4, "dropout": 0.3},
}
FORMS = {
    "forms": (models.forms, "all,!norm"),
    "experts": (models.experts, "up,down"),
    "attention": (models.attention, "attn.*"),
    "parts": (models.attention, "attn.q,attn.v"),
    "interleaved": (models.interleaved, "attn.q,attn.v,attn.out"),
    "convnet": (models.convnet, "conv,head"),
}


def close(a, b, tolerance=ROUNDING):
    return float((a - b).abs().max()) <= tolerance * float(a.abs().max())


def trained(program, scale=0.3, seed=1):
    """Change parameters at random; frozen tensors (a residual, an index) stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if isinstance(tensor, nn.Parameter):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)
    return program


def lora(target, **options):
    return surgery.Lora(target=target, **{"rank": 2, **options})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_inserted_then_merged(form, variant):
    factory, target = FORMS[form]
    module, inputs = factory()
    base = surgery.capture(module, inputs)
    program = base.apply(lora(target, **VARIANTS[variant]))
    seen = observe(base.run(), program.run())
    assert seen.equal or (variant.startswith("pissa") and seen.difference < 1e-6)
    trained(program)
    assert not close(program.run(), base.run(), 1e-3)
    merged = program.merge()
    assert close(merged.run(), program.run())
    assert set(merged.module().state_dict()) == set(module.state_dict())
    half = program.weighted({"lora": 0.5})
    assert close(half.merge().run(), half.run())
    assert torch.equal(program.undo_all().run(), base.run())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("gaussian", "pissa, randomised")])
def test_conformance(variant):
    """The kit without checks that start processes or export (below). PiSSA's rank is that of a depthwise kernel."""
    options = VARIANTS[variant]
    for factory, target in (FORMS["forms"], FORMS["interleaved"]):
        assert check_pass(lora(target, **options), surgery.capture(*factory()), checks=CHEAP).ok


def test_conformance_of_a_bias():
    """On linear weights and convolutions. A weight without a bias keeps the branch, since nothing could hold β."""
    base = surgery.capture(*models.forms())
    report = check_pass(
        lora("path:linear,path:conv1,path:conv2,path:depthwise", bias=True), base, checks=CHEAP
    )
    assert set(report.skipped) == {"tied"}, report
    kept = trained(base.apply(lora("head", bias=True)))
    with pytest.raises(PassError, match="the base has no bias that could hold the one of the update"):
        kept.merge()
    with pytest.raises(
        PassError, match="an update of a weight of kind embedding has no bias; leave out --bias"
    ):
        base.apply(lora("embed", bias=True))


def test_conformance_across_the_groups_of_a_convolution():
    base = surgery.capture(*models.forms())
    report = check_pass(lora("path:conv1", across=True), base, checks=CHEAP)
    assert set(report.skipped) == {"merge", "restored", "weights"}, report
    assert base.apply(lora("path:conv1", across=True)).tensors["conv1.lora.A"].shape == (2, 8, 3)
    with pytest.raises(PassError, match="it has 6 groups, and --across needs a rank that they divide"):
        base.apply(lora("path:depthwise", across=True))


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_conformance_in_full(variant):
    """Another process, ONNX, unflatten."""
    program = surgery.load("py:tests.shared.models:convnet")
    report = check_pass(lora("conv,head", **{**VARIANTS[variant], "rank": 2}), program)
    assert set(report.skipped) == {"tied"}, report


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_conformance_in_full_on_minilm(variant):
    report = check_pass(lora("attn.q,mlp.down", **{**VARIANTS[variant], "rank": 2}), real("minilm"))
    assert set(report.skipped) == {"tied"}, report


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "t5", "vit", "wav2vec2", "resnet18", "mixtral", "mamba"])
@pytest.mark.parametrize("variant", ["rslora", "dropout", "dora", "dora, full gradient", "pissa"])
def test_conformance_on_models(model, variant):
    targets = {"resnet18": "layer2.*.conv*,head", "mamba": "all-linear"}
    target = targets.get(model, "attn.q,attn.v,mlp.down")
    assert check_pass(lora(target, **{**VARIANTS[variant], "rank": 2}), real(model), checks=CHEAP).ok


# -- rsLoRA


def test_rslora_scales_by_the_root_of_the_rank():
    base = surgery.capture(*models.attention())
    program = trained(base.apply(lora("attn.out", rank=4, alpha=6, rslora=True)))
    a, b = (program.tensors[f"out.lora.{n}"].detach() for n in "AB")
    moved = program.merge().state()["out.weight"] - base.state()["out.weight"]
    assert close(moved, 6 / 4**0.5 * b @ a, 1e-5)


# -- DoRA


class Doubled(nn.Module):
    """The weight of the paper, written out: m ⊙ (W + s·B A)/‖W + s·B A‖."""

    def __init__(self, linear, a, b, m, scale, constant):
        super().__init__()
        self.linear, self.scale, self.constant = linear, scale, constant
        self.a, self.b, self.m = (nn.Parameter(t.detach().clone()) for t in (a, b, m))

    def forward(self, x):
        direction = self.linear.weight + self.scale * self.b @ self.a
        norm = direction.norm(dim=1)
        norm = norm.detach() if self.constant else norm
        return functional.linear(x, (self.m / norm)[:, None] * direction, self.linear.bias)


@pytest.mark.parametrize("full", [False, True])
def test_dora_is_the_papers_weight_with_its_gradients(full):
    module, inputs = models.attention()
    program = surgery.capture(module, inputs).apply(lora("attn.out", dora=True, full_gradient=full, alpha=6))
    assert torch.equal(program.tensors["out.lora.m"], module.out.weight.detach().norm(dim=1))
    trained(program)
    run = program.module().train()
    run(*inputs).square().sum().backward()
    module.out = Doubled(module.out, *(program.tensors[f"out.lora.{n}"] for n in "ABm"), 3.0, not full)
    module(*inputs).square().sum().backward()
    assert close(program.run(), module(*inputs).detach())
    for name in "ABm":
        assert close(getattr(module.out, name.lower()).grad, program.tensors[f"out.lora.{name}"].grad), name
    assert close(program.merge().run(), module(*inputs).detach())


def test_the_norm_is_a_constant_unless_asked():
    a, b = (surgery.Lora(target="all", dora=True, full_gradient=full) for full in (False, True))
    assert "constant" in a.expectations.detached
    assert not b.expectations.detached
    assert "along it" in b.expectations.redirected


def test_dora_merged_untrained_is_the_weight_itself():
    """Half precision too: the ratio is one to the bit, so nothing is rounded again."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        module, inputs = models.attention()
        base = surgery.capture(module.to(dtype), tuple(x.to(dtype) for x in inputs))
        program = base.apply(lora("attn.*", dora=True))
        assert torch.equal(program.run(), base.run())
        merged = program.merge().state()
        assert all(torch.equal(merged[n], t) for n, t in base.state().items())


def test_dora_on_a_module_that_is_used_twice_has_one_norm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    base = surgery.capture(Twice(), torch.randn(3, 4))
    program = base.apply(lora("layer", dora=True))
    assert torch.equal(program.run(), base.run())
    trained(program)
    norms = [n for n in program.graph.nodes if n.target is aten.linalg_vector_norm.default]
    assert len(norms) == 1
    assert close(program.merge().run(), program.run())


def test_dora_on_a_product_from_the_left():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return self.weight @ x

    for options in ({"dora": True}, {"init": "pissa"}):
        base = surgery.capture(Left(), torch.randn(3, 4, 5))
        program = base.apply(lora("weight", **options))
        assert close(program.run(), base.run(), 1e-6)
        trained(program)
        assert close(program.merge().run(), program.run())


def test_dora_on_one_part_leaves_the_others_bit_for_bit():
    for factory in (models.attention, models.interleaved):
        base = surgery.capture(*factory())
        (site,) = [s for s in base.sites if s.role == "attn.qkv"]
        program = trained(base.apply(lora("attn.v", dora=True)))
        changed = program.merge().state()["project.weight"] != base.state()["project.weight"]
        assert changed.any(1).nonzero().flatten().tolist() == list(site.parts["v"])


def test_a_convolution_that_projects_q_k_and_v_takes_parts():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Conv2d(4, 12, 1)

        def forward(self, x):
            batch, _, height, width = x.shape
            q, k, v = self.project(x).reshape(batch, 3, 4, height * width).transpose(2, 3).unbind(1)
            return functional.scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    base = surgery.capture(Attention(), torch.randn(2, 4, 3, 3))
    for options in ({}, {"dora": True}, {"init": "pissa"}):
        program = base.apply(lora("attn.q,attn.v", **options))
        assert close(program.run(), base.run(), 1e-6)
        trained(program)
        assert close(program.merge().run(), program.run())
        changed = program.merge().state()["project.weight"] != base.state()["project.weight"]
        assert set(changed.flatten(1).any(1).nonzero().flatten().tolist()) <= {*range(4), *range(8, 12)}


# -- PiSSA


@pytest.mark.parametrize("iterations", [0, 8])
def test_pissa_starts_at_the_principal_part(iterations):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16), nn.Conv2d(6, 8, 3, groups=2))
    u, _, v = torch.linalg.svd(net[0].weight.detach())
    with torch.no_grad():  # a spectrum that a randomised SVD finds too
        net[0].weight.copy_(u @ torch.diag(2.0 ** -torch.arange(16)) @ v[:16])

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = net

        def forward(self, x, image):
            return self.linear(x), self.conv(image)

    base = surgery.capture(Both(), (torch.randn(3, 24), torch.randn(3, 6, 5, 5)))
    program = base.apply(lora("all", rank=3, init="pissa", svd_iterations=iterations))
    for path, groups in (("linear", 1), ("conv", 2)):
        a, b, residual = (program.tensors[f"{path}.lora.{n}"].detach() for n in ("A", "B", "residual"))
        weight = base.state()[f"{path}.weight"].detach()
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        best = (u[:, :, :3] * s[:, None, :3]) @ v[:, :3]
        a, b = a.reshape(groups, 3, -1), b.reshape(groups, -1, 3)
        assert close(best, program.journal.entries[-1].options["alpha"] / 3 * b @ a, 1e-5)
        # the two share the singular values evenly
        assert close(a.norm(dim=2), b.norm(dim=1), 1e-5)
        assert close(matrix - best, residual.reshape(matrix.shape), 1e-5)
    assert not any(isinstance(t, nn.Parameter) for n, t in program.tensors.items() if n.endswith("residual"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pissa_keeps_its_word_in_other_dtypes(dtype):
    module, inputs = models.attention()
    base = surgery.capture(module.to(dtype), tuple(x.to(dtype) for x in inputs))
    program = base.apply(lora("attn.*", init="pissa"))
    allowed = PISSA_MOVES.on(dtype)
    assert program.journal.entries[-1].numerics["declared"] == str(allowed)
    assert observe(base.run(), program.run()).within(allowed)
    assert torch.equal(trained(program).undo("lora").run(), base.run())
    assert close(program.merge().run().double(), program.run().double(), 10 * allowed.tolerance)


def test_pissa_on_one_use_of_a_tied_weight_leaves_the_other(tmp_path):
    module, inputs = models.forms()
    base = surgery.capture(module, inputs)
    for target, other in (("head", "embed"), ("embed", "head")):
        program = trained(base.apply(lora(target, init="pissa")))
        state = program.state()
        assert state["head.weight"] is state["embed.weight"]
        assert torch.equal(state["head.weight"], module.embed.weight)
        merged = program.merge()
        assert torch.equal(merged.state()[f"{other}.weight"], module.embed.weight)
        assert close(merged.run(), program.run())


def test_loading_computes_no_svd(tmp_path, monkeypatch):
    program = trained(surgery.load("py:tests.shared.models:attention").apply(lora("attn.*", init="pissa")))
    program.save(tmp_path / "saved")

    def fails(*args, **kwargs):
        raise AssertionError("an SVD is computed")

    for name in ("svd", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, fails)
    monkeypatch.setattr(torch, "svd_lowrank", fails)
    loaded = surgery.load(str(tmp_path / "saved"), base="py:tests.shared.models:attention")
    assert torch.equal(loaded.run(*program.example_inputs[0]), program.run())
    loaded.undo("lora")


# -- dropout


def test_dropout_is_in_the_train_graph_alone():
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    torch.manual_seed(1)
    program = trained(base.apply(lora("attn.*", dropout=0.5)))
    torch.manual_seed(1)
    plain = trained(base.apply(lora("attn.*")))
    assert torch.equal(program.run(), plain.run())
    assert not [n for n in program.graph.nodes if n.target is aten.dropout.default]
    run = program.module()
    first, second = run(*inputs), run(*inputs)
    assert torch.equal(first, second)
    run.train()
    dropped = [n for n in run.graph_module().graph.nodes if n.target is aten.dropout.default]
    assert [n.args[1:] for n in dropped] == [(0.5, True)] * 2
    assert not torch.equal(run(*inputs), run(*inputs))
    assert torch.equal(run.eval()(*inputs), first)


def test_dropout_drops_what_enters_the_branch():
    """One linear layer, by hand; with B = 0 the output is the base's, for any dropout."""
    torch.manual_seed(0)
    base = surgery.capture(nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6))
    fresh = base.apply(lora("0", dropout=0.5)).module().train()
    x = base.example_inputs[0][0]
    assert torch.equal(fresh(x), base.run())
    program = trained(base.apply(lora("0", dropout=0.5)))
    run = program.module().train()
    a, b = (program.tensors[f"0.lora.{n}"].detach() for n in "AB")
    torch.manual_seed(3)
    got = run(x)
    torch.manual_seed(3)
    by_hand = base.run() + 8.0 * functional.dropout(x, 0.5) @ a.t() @ b.t()
    assert close(by_hand, got.detach())


def test_an_embedding_has_nothing_to_drop():
    module, inputs = models.forms()
    run = surgery.capture(module, inputs).apply(lora("embed", dropout=0.5)).module().train()
    dropped = [n for n in run.graph_module().graph.nodes if n.target is aten.dropout.default]
    assert len(dropped) == 1  # the model's own


# -- all of them learn


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_digits_and_moves_nothing_else(variant):
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data[:256], dtype=torch.float32) / 16
    y = torch.tensor(digits.target[:256])
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    base = surgery.capture(net, x[:16])
    program = base.apply(lora("all", **{**VARIANTS[variant], "rank": 4}))
    before = {n: t.detach().clone() for n, t in program.state().items()}
    run = program.module().train()
    optimiser = torch.optim.AdamW(program.parameter_groups(lr=2e-2))
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(run(x), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses
    after = program.state()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    own = "ABm" if "dora" in variant else "AB"
    assert moved == {f"{path}.lora.{name}" for path in ("0", "2") for name in own}
    assert torch.equal(program.undo_all().run(), base.run())


# -- with other passes at the same site

BELOW = {
    "lora": lambda: lora("attn.*", label="other"),
    "dora": lambda: lora("attn.*", dora=True, label="other"),
    "ia3, output": lambda: IA3(target="attn.*", scale="output", label="other"),
    "ia3, input": lambda: IA3(target="attn.*", scale="input", label="other"),
    "sparse-tune": lambda: surgery.SparseTune(target="attn.*", density=0.2, label="other"),
    "pissa": lambda: lora("attn.*", init="pissa", label="other"),
}


@pytest.mark.parametrize("other", BELOW)
@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}], ids=["dora", "pissa"])
def test_before_and_after_others(other, options):
    """Exact on top of what was trained, merged as it computes, and each can be left out alone."""
    base = surgery.capture(*models.attention())
    this = lora("attn.*", label="this", **options)
    for first, second in ((this, BELOW[other]()), (BELOW[other](), this)):
        one = trained(base.apply(first))
        if getattr(second, "init", "") == "pissa" and (first.name == "ia3" or getattr(first, "dora", False)):
            with pytest.raises(
                PassError, match=r"acts on the op with all of its weight.*apply it after this"
            ):
                one.apply(second)
            continue
        both = one.apply(second)
        assert observe(one.run(), both.run()).within(second.numerics)
        assert torch.equal(both.without(second.label).run(), one.run())
        trained(both, seed=2)
        assert close(both.merge().run(), both.run())
        alone = both.without(first.label)
        assert close(alone.merge().run(), alone.run())
        assert torch.equal(both.undo(second.label).run(), both.without(second.label).run())


def test_the_base_trains_beside_dora_but_not_under_pissa():
    module, inputs = models.attention()
    for options, trains in (({"dora": True}, True), ({"init": "pissa"}, False)):
        program = surgery.capture(copy.deepcopy(module), inputs).apply(
            lora("attn.out", **options), freeze_base=False
        )
        run = program.module().train()
        run(*inputs).square().sum().backward()
        # Under PiSSA the graph reads the residual, and the module does not have the weight.
        weight = dict(run.named_parameters()).get("out.weight")
        assert (weight is not None and weight.grad is not None) == trains


# -- refusals


def test_options_that_go_together():
    for options, remedy in (
        ({"full_gradient": True}, "add --dora"),
        ({"svd_iterations": 4}, "for --init pissa"),
        ({"dora": True, "init": "pissa"}, "choose one of them"),
        ({"dora": True, "bias": True}, "--bias is for a plain update"),
    ):
        with pytest.raises(PassError, match=f"pass 'lora': .*{remedy}"):
            surgery.Lora(target="all", **options)
    with pytest.raises(ValidationError):
        surgery.Lora(target="all", dropout=1.0)
    with pytest.raises(PassError, match="pass 'lora': --init is 'svd'"):
        surgery.Lora.parse({"init": "svd"})


def test_a_zero_weight_has_no_direction():
    net = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[1] = 0
    with pytest.raises(
        PassError, match=r"lora at 0: refused, the weight of its output 1 is zero.*leave --dora out"
    ):
        surgery.capture(net, torch.randn(2, 4)).apply(surgery.Lora(target="0", rank=2, dora=True))


def test_no_more_singular_values_than_there_are():
    with pytest.raises(
        PassError, match=r"lora at 0: refused, .*no more than 3 singular values; give --rank 3"
    ):
        surgery.capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)).apply(
            surgery.Lora(target="0", rank=8, init="pissa")
        )
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    program = surgery.capture(depthwise, torch.randn(2, 4, 5, 5))
    with pytest.raises(PassError, match="no more than 1 singular values; give --rank 1 or less"):
        program.apply(surgery.Lora(target="0", rank=2, init="pissa"))


def test_an_op_that_was_replaced_has_no_weight_to_compute_with():
    base = surgery.capture(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), torch.randn(2, 16))
    factored = base.apply(surgery.LowRank(target="0", rank=2))
    for options, option in (({"dora": True}, "--dora"), ({"init": "pissa"}, "--init pissa")):
        with pytest.raises(PassError, match=f"low-rank has put another op in its place; leave {option} out"):
            factored.apply(surgery.Lora(target="path:0.weight", rank=1, **options))


def test_the_options_from_the_command_line(tmp_path, capsys):
    """Applied, loaded and merged; an option out of place gets one line."""
    model = "py:tests.shared.models:attention"

    def run(*words):
        with pytest.raises(SystemExit) as done:
            main([str(word) for word in words])
        return done.value.code

    every = {
        "dora": ["--dora", "--full-gradient", "--rslora", "--dropout", "0.1"],
        "pissa": ["--init", "pissa", "--svd-iterations", "2"],
    }
    for name, options in every.items():
        path = tmp_path / name
        words = ["--pass", "lora", "--target", "attn.*", "--rank", "2", *options]
        assert run("apply", model, *words, "-o", path) == 0
        given = surgery.load(str(path), base=model).journal.entries[-1].options
        assert (given["dora"], given["init"]) == ((True, "kaiming") if name == "dora" else (False, "pissa"))
        assert run("merge", path, "-o", tmp_path / f"{name}-merged", "--base", model) == 0
    capsys.readouterr()
    assert run("plan", model, "--pass", "lora", "--target", "all", "--full-gradient") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "--full-gradient is about the norm of DoRA; add --dora" in said[0]
