"""sparse: exact patterns, scores by hand, zeros that stay, undo and refusals, and adapters on top."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.api import PassError, Probe
from surgery.api.programs import ExportError
from surgery.cli import main
from surgery.engine.contract.observe import observe
from surgery.engine.registry import find_pass
from surgery.passes.sparse import Layout, Pattern, choose, count
from surgery.passes.sparse.inputs import norms
from surgery.store.hf import write_hf
from surgery.testing import check_pass
from tests.conftest import minilm_path
from tests.passes.quantize.test_quantize import every
from tests.shared import models

# What depends on which values are chosen; the rest is asked once.
KIT = ("numerics", "untouched", "merge", "restored", "undo", "gradients", "held", "input")


def scores(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_patterns_by_hand():
    row = torch.tensor([[[[4.0, 1.0, 3.0, 2.0, 8.0, 7.0, 6.0, 5.0]]]])

    def kept(pattern, sparsity, scope="weight", given=row):
        (mask,) = choose([given], Pattern.parse(pattern), sparsity, scope)
        return given[mask].tolist()

    assert kept("unstructured", 0.5) == [8, 7, 6, 5]
    assert kept("unstructured", 0.25) == [4, 3, 8, 7, 6, 5]
    assert kept("2:4", 0.5) == [4, 3, 8, 7]
    assert kept("1:4", 0.75) == [4, 8]
    assert kept("2:4", 0.25) == [4, 3, 8, 7, 6, 5]  # on the way there: the least of those that will go
    assert kept("1x2", 0.5) == [8, 7, 6, 5]
    two = torch.tensor([[[[1.0, 1.0]], [[5.0, 6.0]], [[2.0, 9.0]], [[2.0, 1.0]]]])
    assert kept("2x1", 0.5, given=two) == [1, 6, 9, 1]
    assert kept("unstructured", 0.5, "row", two) == [1, 6, 9, 2]  # of equals the first goes


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["weight", "row", "global"])
def test_as_many_as_asked(scope, sparsity):
    given = [scores(2, 6, 3, 10), scores(1, 4, 1, 20), torch.ones(1, 4, 1, 20)]
    masks = choose(given, Pattern(), sparsity, scope)
    gone = [int((~mask).sum()) for mask in masks]
    assert count([g.shape for g in given], Pattern(), sparsity, scope) == (
        [sum(gone)] if scope == "global" else gone
    )
    assert abs(sum(gone) - sparsity * 520) <= (0.5 * 20 if scope == "row" else 1.5)
    if scope == "row":
        assert {int(n) for n in (~masks[0]).sum((2, 3)).flatten()} == {round(sparsity * 30)}


def zeros_of(program, site):
    """Mask of the zeros that the op reads, in its layout."""
    own = program.sites.by_key[site.key]
    return Layout.of(own).laid(Probe(program).stored(own)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.75, "scope": "row"},
        {"sparsity": 0.8, "scope": "global"},
        {"pattern": "1:2"},
        {"pattern": "2x1", "sparsity": 0.5},
        {"criterion": "wanda"},
        {"schedule": "cubic", "end": 4},
    ],
    ids=str,
)
def test_every_form_of_weight(options):
    base = every()
    passed = surgery.Sparse(target="all", **options)
    program = base.apply(passed)
    planned = program.reports[-1].plan
    assert len(planned.accepted) >= 6
    total = zeros = 0
    for each in planned.accepted:
        gone = zeros_of(program, each.site)
        decided = each.site.decided
        assert float(gone.double().mean()) == pytest.approx(decided["sparsity"], abs=1e-6)
        total, zeros = total + gone.numel(), zeros + int(gone.sum())
        if options.get("pattern") == "1:2":
            assert (gone.reshape(-1, 2).sum(1) == 1).all()
    asked = 0 if "schedule" in options else options.get("sparsity", 0.5)
    # One value of each row, or one of each weight, rounds either way.
    assert zeros / total == pytest.approx(asked, abs=0.03)
    checks = None if not options or "schedule" in options else KIT
    report = check_pass(passed, base, checks=checks)
    assert not report.failed, report


@pytest.mark.parametrize("form", ["forms", "experts", "convnet", "attention", "interleaved"])
def test_kit_on_small_models(form):
    """Tied and depthwise weights, layouts of experts, batch norm, a fused projection."""
    module, inputs = getattr(models, form)()
    base = surgery.capture(module, inputs)
    target = "all,!norm" if form in ("forms", "convnet") else "all"
    report = check_pass(surgery.Sparse(target=target, sparsity=0.4), base)
    assert not report.failed, report


def test_what_wanda_multiplies_with():
    """Each norm, one by one: of linear layers in both layouts, of patches, of an expert's own rows."""
    torch.manual_seed(0)
    base = every()
    probe = Probe(base)
    sites = {s.path: s for s in Probe(base).program.sites}
    found = {}
    for path in ("linear", "left", "conv", "up", "experts"):
        found[path] = norms(replace(sites[path], measured=probe))
    module = base.base.loaded.module
    ids, image = base.example_inputs[0]
    with torch.no_grad():
        x = module.embed(ids)
        torch.testing.assert_close(found["linear"].flatten(), x.norm(dim=0))
        x = torch.addmm(module.addmm_bias, torch.tanh(module.linear(x)) @ module.conv1d, module.addmm)
        torch.testing.assert_close(found["left"].flatten(), x.norm(dim=0))
        for expert in range(3):
            rows = x[ids.remainder(3) == expert]
            torch.testing.assert_close(found["experts"][expert].flatten(), rows.norm(dim=0))
        patches = F.unfold(image, 3, padding=1).transpose(1, 2).reshape(-1, 2, 9)
        for group in range(2):  # two filters each, of one channel
            wanted = patches[:, group].norm(dim=0)
            for filter_ in (2 * group, 2 * group + 1):
                torch.testing.assert_close(found["conv"][0, filter_, :, 0], wanted)
        y = torch.tanh(module.conv(image))
        wanted = y.pow(2).sum((0, 2, 3)).sqrt()  # a stride of its size: each value meets each weight once
        torch.testing.assert_close(found["up"][0], wanted.expand(2, 4, 4))


def held_zeros(program, before):
    return all(torch.equal(before[s.key], zeros_of(program, s)) for s in program.sites if s.key in before)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_zeros_hold_while_it_trains(kind):
    """With momentum and decay, in train mode, until saved, merged and written."""
    module, inputs = models.convnet()
    base = surgery.capture(module, inputs)
    program = base.apply(surgery.Sparse(target="all,!norm", pattern="unstructured", sparsity=0.6))
    sites = [s for s in program.sites if s.key in {r.key for r in program.journal.entries[-1].sites}]
    before = {s.key: zeros_of(program, s) for s in sites}
    start = {s.key: Probe(program).stored(s).clone() for s in sites}
    module = program.module().train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
    }[kind]()
    for _ in range(5):
        optimiser.zero_grad()
        F.cross_entropy(module(*inputs), torch.tensor([0, 1, 2])).backward()
        optimiser.step()
    module.eval()
    assert held_zeros(program, before)
    for site in sites:
        moved = Probe(program).stored(site) != start[site.key]
        assert moved.any()
    merged = program.merge()
    for site in merged.sites:
        if site.key in before:
            weight = merged.state()[site.weight]
            assert torch.equal(Layout.of(site).laid(weight) == 0, before[site.key])


def test_undone_to_the_bit_and_out_of_the_way():
    base = every()
    program = base.apply(surgery.Sparse(target="all"))
    assert observe(program.without("sparse").run(), base.run()).equal
    assert observe(program.undo("sparse").run(), base.run()).equal
    assert observe(program.merge().undo("merge").run(), program.run()).equal


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(kind):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).to(kind).eval()
    base = surgery.capture(module, (torch.randn(2, 64).to(kind),))
    program = base.apply(surgery.Sparse(target="all", pattern="2:4", criterion="wanda"))
    assert program.run().dtype == kind
    for site in program.sites:
        assert (zeros_of(program, site).reshape(-1, 4).sum(1) == 2).all()
    assert torch.equal(program.merge().run(), program.run())


def test_refused_and_said():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(30, 64), nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 8))
    with torch.no_grad():
        module[2].weight[0, 0] = float("nan")
        module[3].weight.zero_()
    base = surgery.capture(module.eval(), (torch.randn(2, 30),))

    def refused(program=base, **options):
        planned = program.plan(surgery.Sparse(target="all", **options)).passes[-1]
        return {row.site.path: row.refusal for row in planned.refused}

    found = refused(pattern="2:4")
    assert "an output has 30 inputs, which groups of 4 do not divide; use another n:m" in found["0"]
    assert "1" not in found
    assert "its weight contains inf or NaN; fix the model first" in found["2"]
    assert "all its values are zero" in found["3"]
    assert "blocks of 4x4 do not divide" in refused(pattern="4x4")["0"]
    assert "removes none of its 1,920 values; raise --sparsity" in refused(sparsity=1e-4)["0"]
    assert "all its values are above --threshold 0; train with a penalty" in refused(threshold=0)["1"]
    assert "none of its values is above --threshold 9" in refused(threshold=9)["1"]
    rounded = base.apply(surgery.Quantize(target="path:1"))
    assert "'quantize' has quantized it already; undo that, make it sparse" in refused(rounded)["1"]
    adapted = base.apply(surgery.Lora(target="path:1", rank=2))
    assert "it carries 'lora', made for the dense weight; make it sparse first" in refused(adapted)["1"]
    factored = base.apply(surgery.LowRank(target="path:1", rank=4), verify=False)
    assert "'low-rank' has put another" in refused(factored)["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "4:4"}, r"4:4 keeps 4 of 4 values"),
        ({"pattern": "0:4"}, r"0:4 keeps 0 of 4 values"),
        ({"pattern": "two"}, r"'two' is not a pattern; write unstructured, n:m such as 2:4, or a block"),
        ({"pattern": "1x1"}, r"1x1 is not a block"),
        ({"pattern": "2:4", "sparsity": 0.5}, r"2:4 sets the sparsity itself; leave out --sparsity"),
        ({"pattern": "2:4", "scope": "row"}, r"leave out --scope"),
        ({"pattern": "4x4", "scope": "row"}, r"a block spans several outputs"),
        ({"sparsity": 1.0}, r"--sparsity is 1.0"),
        ({"sparsity": -0.1}, r"--sparsity is -0.1"),
        (
            {"threshold": 0.1, "sparsity": 0.5},
            r"--threshold alone decides what is kept; leave out --sparsity",
        ),
        ({"threshold": 0.1, "criterion": "wanda"}, r"leave out --criterion wanda"),
        ({"threshold": 0.1, "pattern": "2:4"}, r"leave out --pattern 2:4"),
        ({"begin": 3}, r"--begin is for a schedule; add --schedule cubic"),
        ({"schedule": "cubic"}, r"a schedule needs an --end after its --begin of 0"),
        ({"schedule": "cubic", "begin": 5, "end": 5}, r"a schedule needs an --end after its --begin of 5"),
        ({"schedule": "cubic", "end": 5, "initial": 0.6}, r"--initial 0.6 is not below"),
        (
            {"schedule": "cubic", "end": 5, "criterion": "wanda"},
            r"a schedule compares the current magnitudes of weights; leave out --criterion wanda",
        ),
    ],
    ids=str,
)
def test_options_that_contradict(options, message):
    with pytest.raises(PassError, match=message):
        surgery.Sparse.parse({"target": "all", **options})


def test_data_that_tells_nothing():
    torch.manual_seed(0)
    base = surgery.capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), (torch.randn(2, 8),))
    wanda = surgery.Sparse(target="path:0", criterion="wanda")
    with pytest.raises(PassError, match="its input is zero on all of the data; give data that reaches it"):
        base.apply(wanda, data=[((torch.zeros(2, 8),), {})])
    with pytest.raises(PassError, match=r"data set 1: the input .* contains inf or NaN; clean the data"):
        base.apply(wanda, data=[((torch.full((2, 8), float("nan")),), {})])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([((torch.zeros(2, 7),), {})], r"has shape \[2, 7\], and the model takes \[any, 8\]"),
        ([((torch.ones(2, 8),), {}), ((), {"x": torch.zeros(2, 8)})], "data set 2"),
        ([((torch.zeros(2, 8).long(),), {})], "is torch.int64, and the model takes torch.float32"),
        ([torch.zeros(3, 8)], "data set 1 is not a pair"),
    ],
    ids=["shape", "name", "dtype", "form"],
)
def test_data_that_the_model_does_not_take(data, why):
    base = surgery.capture(nn.Sequential(nn.Linear(8, 8)).eval(), (torch.randn(2, 8),))
    with pytest.raises(PassError, match=why) as caught:
        base.apply(surgery.Sparse(target="all", criterion="wanda"), data=data)
    assert "\n" not in str(caught.value)


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    def run(*options):
        with pytest.raises(SystemExit) as ended:
            main(
                ["plan", "py:tests.shared.models:convnet", "--pass", "sparse", "--target", *map(str, options)]
            )
        out, err = capsys.readouterr()
        return ended.value.code, out if ended.value.code == 0 else err.splitlines()

    code, said = run("conv", "--sparsity", 0.5)
    assert code == 0
    assert "50.0% zeros; the weight" in " ".join(said.split())
    for options, message in (
        (("conv", "--pattern", "5:4"), "error: pass 'sparse': --pattern 5:4 keeps 5 of 4 values"),
        (("conv", "--sparsity", 2), "error: pass 'sparse': --sparsity is"),
        (("nothing",), "error: target 'nothing'"),
        (("conv", "--criterion", "wanda", "--data", tmp_path / "none.npz"), "error: --data"),
    ):
        code, lines = run(*options)
        assert code == 2
        assert len(lines) == 1
        assert lines[0].startswith(message)


def test_global_takes_where_weights_are_small():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    with torch.no_grad():
        module[0].weight.mul_(10)
    base = surgery.capture(module, (torch.randn(2, 32),))
    program = base.apply(surgery.Sparse(target="all", sparsity=0.5, scope="global"))
    first, second = (zeros_of(program, site) for site in program.sites)
    assert int(first.sum() + second.sum()) == 1024
    assert first.float().mean() < 0.15
    assert second.float().mean() > 0.85


def test_adapters_stand_on_zeros_and_stay_beside(tmp_path):
    """Only the adapter trains. A merge would fill the zeros, so it stays a branch, with a notice; undo is exact."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    base = surgery.capture(module, (torch.randn(2, 16),), {"input": {0: "batch"}})
    sparse = base.apply(surgery.Sparse(target="all", pattern="2:4"))
    program = sparse.apply(surgery.Lora(target="all", rank=2))
    assert torch.equal(program.run(), sparse.run())
    trained = program.module()
    trained(torch.randn(3, 16)).sum().backward()
    assert {n for n, p in trained.named_parameters() if p.grad is not None} == {
        n for n in program.tensors if "lora" in n
    }
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if name.endswith("lora.B"):
                tensor.normal_(generator=torch.Generator().manual_seed(1))
    merged = program.merge()
    entry = merged.journal.entries[-1]
    assert entry.options["folded"] == ["sparse"]
    assert entry.options["kept"]["lora"] == (
        "folding it into 0.weight would fill the zeros of sparse; it stays a separate branch"
    )
    for site in merged.sites:
        assert (zeros_of(merged, site).reshape(-1, 4).sum(1) == 2).all()
    report = merged.export(tmp_path / "merged.onnx")
    assert report.parity.error <= 1e-5
    assert torch.equal(program.undo("lora").run(), sparse.run())
    assert torch.equal(program.undo("sparse").undo("lora").run(), base.run())


def test_a_plan_of_several_is_what_applying_does():
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    lora, sparse = surgery.Lora(target="out", rank=2), surgery.Sparse(target="out,project")
    (late,) = [p for p in base.plan(lora, sparse).passes if p.pass_ is sparse]
    assert {row.site.path for row in late.refused} == {"out"}
    more = surgery.Sparse(target="out", sparsity=0.75, label="more")
    planned = base.plan(sparse, more).passes[-1].accepted[0].site.decided
    done = base.apply(sparse, more)
    assert done.journal.entries[-1].sites[0].decided == planned
    assert int((done.merge().state()["out.weight"] == 0).sum()) == 48


@pytest.mark.parametrize("name", ["ia3", "bitfit"])
def test_what_keeps_the_zeros_is_folded_with_them(name):
    """Scales of inputs or outputs, and biases, can be folded."""
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    pass_ = find_pass(base.base.plugins, name).cls.parse({"target": "out"})
    program = base.apply(surgery.Sparse(target="out"), pass_)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))
    merged = program.merge()
    assert merged.journal.entries[-1].options["folded"] == ["sparse", name]
    assert int((merged.state()["out.weight"] == 0).sum()) == 32


def test_through_a_transformers_directory(tmp_path):
    """Merged, written and loaded like any model: the zeros stay, and codes keep them."""
    base = surgery.load(
        f"hf:{minilm_path()}", task="feature-extraction", model_kwargs={"num_hidden_layers": 1}
    )
    sparse = base.apply(surgery.Sparse(target="attn.*,mlp.*", pattern="2:4"))
    write_hf(sparse.merge(), tmp_path / "hf")
    again = surgery.load(f"hf:{tmp_path / 'hf'}", task="feature-extraction")
    coded = again.apply(surgery.Quantize(target="attn.*,mlp.*"))
    for site in again.sites:
        if site.role.startswith(("attn", "mlp")):
            gone = zeros_of(again, site)
            assert (gone.reshape(-1, 4).sum(1) == 2).all()
            assert (zeros_of(coded, site) | ~gone).all()
    with pytest.raises(ExportError, match=r"'lora' is not folded .* would fill the zeros of sparse"):
        write_hf(sparse.apply(surgery.Lora(target="attn.q")).merge(), tmp_path / "other")


def test_sparse_tune_below_is_masked_too():
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    program = base.apply(surgery.SparseTune(target="out", density=0.5), surgery.Sparse(target="out"))
    with torch.no_grad():
        program.tensors["out.sparse-tune.values"].normal_(generator=torch.Generator().manual_seed(1))
    merged = program.merge()
    assert torch.equal(merged.run(), program.run())
    assert int((merged.state()["out.weight"] == 0).sum()) == 32


def test_in_onnx(tmp_path):
    """Merged, the zeros are in the file; unmerged, the mask is there under its name."""
    module, inputs = models.convnet()
    base = surgery.capture(module, inputs)
    program = base.apply(surgery.Sparse(target="all,!norm", sparsity=0.75))
    report = program.merge().export(tmp_path / "merged.onnx")
    assert report.parity.error <= 1e-5
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "merged.onnx").graph.initializer}
    masks = {r.path: program.tensors[r.tensors["mask"]] for r in program.journal.entries[-1].sites}
    # Batch normalisation is folded into convolutions, which scales a filter and keeps its zeros.
    shapes = [(tuple(m.shape), int((~m).sum())) for m in masks.values()]
    written = [(v.shape, int((v == 0).sum())) for v in stored.values()]
    turned = [(shape[::-1], zeros) for shape, zeros in written]
    assert all(entry in written or entry in turned for entry in shapes), (shapes, written)
    plain = program.export(tmp_path / "plain.onnx")
    assert set(program.tensors) <= set(plain.stored)


ZEROS = ({"format": "int8"}, {"format": "int4"}, {"format": "int4", "asymmetric": True}, {"format": "nf4"})


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("options", ZEROS, ids=str)
def test_sparse_then_quantized_keeps_the_zeros(options, merged, tmp_path):
    """On the mask itself, or on what was merged and captured again; down to ONNX in which the codes stay codes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    x = torch.randn(2, 64)
    sparse = surgery.capture(module, (x,)).apply(surgery.Sparse(target="all", pattern="2:4"))
    if merged:
        state = sparse.merge().state()
        module.load_state_dict({n: state[n].detach().clone() for n in module.state_dict()})
        again = surgery.capture(module, (x,))
        assert torch.equal(again.run(), sparse.run())
        sparse = again
    quantized = sparse.apply(surgery.Quantize(target="all", **options))
    for site in quantized.sites:
        gone = zeros_of(sparse, site)
        assert (gone.reshape(-1, 4).sum(1) == 2).all()
        assert (zeros_of(quantized, site) | ~gone).all()
    # Codes that are zero of themselves apart, the other values stay near what they were.
    assert observe(sparse.run(), quantized.run()).difference < 0.2
    if not merged:
        assert torch.equal(quantized.undo("quantize").run(), sparse.run())
        report = check_pass(surgery.Quantize(target="all", **options), sparse, checks=KIT)
        assert not report.failed, report
    assert quantized.export(tmp_path / "model.onnx").parity.error <= 1e-5


def test_codes_that_would_not_keep_the_zeros():
    torch.manual_seed(0)
    base = surgery.capture(nn.Sequential(nn.Linear(64, 8)).eval(), (torch.randn(2, 64),))
    sparse = base.apply(surgery.Sparse(target="all", pattern="2:4"))
    for options, message in (
        ({"format": "binary"}, "binary codes cannot represent its zeros, so use another --format"),
        (
            {"method": "gptq"},
            "'sparse' has replaced its weight; gptq would move values into its zeros, so use --method nearest",
        ),
    ):
        with pytest.raises(PassError, match=message):
            sparse.apply(surgery.Quantize(target="all", **options))
