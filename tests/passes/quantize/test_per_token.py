"""Row-wise quantized inputs: the op, its saved tensors, and integer products in onnxruntime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.api import PassError, Probe
from surgery.cli import main
from surgery.engine.contract.observe import observe
from surgery.export.runtime import OnnxModel
from surgery.passes.quantize.codes import decode
from surgery.passes.quantize.ops import round_activation
from surgery.testing import check_pass
from tests.conftest import minilm_path
from tests.passes.quantize.test_quantize import KIT
from tests.passes.quantize.test_smooth import DATA, SMOOTH, entering, outlying, own_tensors, sites_of
from tests.shared.rounded import check_carried, check_fused, error_under_an_adapter

TOKENS = {"target": "attn.*,mlp.*", "format": "int8-dynamic", "per_token": True}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return outlying(tmp_path_factory.mktemp("planted"))


def rows_by_hand(x, smooth=None):
    """255 levels of each row's largest magnitude, row by row, by hand."""
    factor = torch.ones(x.shape[-1]) if smooth is None else smooth
    found = torch.empty_like(x)
    for given, into in zip(x.flatten(0, -2) / factor, found.flatten(0, -2), strict=True):
        step = given.abs().max() / 127
        into[:] = (given / step).round() * step * factor if step > 0 else 0
    return found


# -- the op


def test_each_row_by_its_own_largest():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32) * torch.logspace(-6, 6, 15).reshape(3, 5, 1)
    x[1, 2] = 0
    rounded = round_activation(x, None, True)
    largest = x.abs().amax(-1, keepdim=True)
    assert bool(((rounded - x).abs() <= largest / 254 * (1 + 1e-5)).all())
    torch.testing.assert_close(rounded, rows_by_hand(x), rtol=1e-5, atol=0)
    assert torch.equal(rounded[1, 2], torch.zeros(32))
    codes = (rounded / largest.clamp(min=1e-30) * 127).abs()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert int(codes.max().round()) == 127
    smooth = torch.linspace(0.1, 5, 32)
    torch.testing.assert_close(
        round_activation(x, smooth, True), rows_by_hand(x, smooth), rtol=1e-4, atol=1e-9
    )


def test_no_row_depends_on_the_others():
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    x[0] *= 1000
    together = round_activation(x, None, True)
    for row, own in zip(x, together, strict=True):
        assert torch.equal(round_activation(row[None], None, True)[0], own)
    assert not torch.equal(round_activation(x)[1:], round_activation(x[1:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_the_gradient(dtype):
    x = torch.randn(4, 16).to(dtype).requires_grad_()
    rounded = round_activation(x, None, True)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded, rows_by_hand(x.detach().float()).to(dtype), rtol=1e-2, atol=1e-3)
    (rounded * 3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


# -- in a program


def test_massive_rows_leave_the_others_as_they_are():
    """One scale for all rows rounds rows of a thousandth of the largest to zero (seen in language models)."""
    torch.manual_seed(0)
    base = surgery.capture(nn.Sequential(nn.Linear(64, 64)).eval(), (torch.randn(4, 64),))
    x = torch.randn(32, 64)
    x[0] *= 10_000
    wanted = base.run(x)[1:]

    def error(**options):
        found = base.apply(surgery.Quantize(target="all", format="int8-dynamic", **options)).run(x)
        return float((found[1:] - wanted).norm() / wanted.norm())

    assert error(per_token=True) < 0.02  # 255 levels on both sides
    assert error() > 0.5


@pytest.mark.parametrize("options", [{}, {"method": "gptq"}, {"smooth": 0.5}])
def test_every_map_by_the_formula(options, planted):
    program = planted.apply(surgery.Quantize(**TOKENS, **options), data=DATA)
    assert len(sites_of(program)) == 14
    for site, record in sites_of(program):
        own = own_tensors(program, record)
        given = decode(own["codes"], own["scale"], None, "int8", site.in_features)
        given = given / own.get("smooth", 1)
        (x,) = entering(program, site, DATA[:1])
        node = site.calls[0].node
        (out,) = Probe(program, DATA[:1]).values([node])[node.name]
        wanted = rows_by_hand(x, own.get("smooth")) @ given.T
        # Sums of at most 64 products in another order; a value between two levels may go either way.
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3 * float(out.abs().max()))


def test_the_budget_measures_rows_by_themselves(planted):
    budget = {**SMOOTH, "smooth": 0, "activation_budget": 1.0}
    moved = {}
    for per_token in (False, True):
        program = planted.apply(surgery.Quantize(**budget, per_token=per_token), data=DATA)
        moved[per_token] = {record.path: record.decided["moved"] for _, record in sites_of(program)}
    for site in planted.sites:
        if site.path not in moved[True]:
            continue
        weight, rows = Probe(planted).weight(site), []
        for x in entering(planted, site, DATA):
            gone, whole = (rows_by_hand(x) - x) @ weight.T, x @ weight.T
            rows.append((gone.norm(dim=-1) / whole.norm(dim=-1)).flatten())
        assert moved[True][site.path] == pytest.approx(float(torch.cat(rows).mean()), rel=1e-2)
    assert sum(moved[True].values()) < sum(moved[False].values())


def test_saved_merged_and_undone(planted, tmp_path):
    # Steps of int8, of the weight and of what enters.
    check_carried(planted, surgery.Quantize(**TOKENS), 0.045, tmp_path / "saved")


def test_trained_rounded_and_converted(planted):
    program = planted.apply(surgery.FakeQuant(**TOKENS))
    converted = program.apply(surgery.Convert())
    assert observe(converted.run(), program.run()).equal
    quantized = planted.apply(surgery.Quantize(**TOKENS))
    assert observe(converted.run(), quantized.run()).equal


def test_the_kit(planted):
    report = check_pass(surgery.Quantize(**TOKENS), planted, checks=(*KIT, "second", "reload", "unflatten"))
    assert not report.failed, report


# -- in ONNX


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"smooth": 0.5}])
def test_fused_by_onnxruntime(options, tmp_path):
    """Every product in integers, one rounding of each input, and no weight in floats."""
    path, passed = tmp_path / "model.onnx", surgery.Quantize(**TOKENS, **options)
    written = check_fused(
        passed, path, error=3e-2, products=12
    )  # a value between two levels may go either way
    assert written["QuantizeLinear"] == 2 * 4


def test_a_row_in_a_file_does_not_depend_on_its_batch(tmp_path):
    """Sums of integers are exact: alone or with others, a row's outputs are the same to the bit."""
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    x[0] *= 100
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    base = surgery.capture(module, (x,))

    def outputs(per_token):
        path = tmp_path / f"{per_token}.onnx"
        passed = surgery.Quantize(target="all", format="int8-dynamic", per_token=per_token)
        base.apply(passed).export(path)
        model = OnnxModel(path)
        (name,) = model.inputs
        given = [x, *(row[None] for row in x)]
        whole, *alone = [model.run({name: each})["output"] for each in given]
        return whole, torch.cat(alone)

    assert torch.equal(*outputs(True))
    assert not torch.equal(*outputs(False))


@pytest.mark.parametrize("dora", [False, True])
def test_exported_under_adapters(dora, tmp_path):
    """DoRA reads the weight itself, so that its product is of floats."""
    assert error_under_an_adapter(dora, tmp_path / "model.onnx", per_token=True) <= 3e-2


# -- refused


@pytest.mark.parametrize("option", ["per_token", "twice"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_other_formats_round_nothing_that_enters(format, option):
    shown = "--" + option.replace("_", "-")
    for kind in (surgery.Quantize, surgery.FakeQuant):
        with pytest.raises(PassError, match=f"{shown} is for int8-dynamic, .* this is {format}; leave it"):
            kind.parse({"target": "all", "format": format, option: True})


def test_command_line(tmp_path, capsys):
    out = tmp_path / "rows"
    given = ["apply", f"hf:{minilm_path()}", "--pass", "quantize", "--target", "mlp.*", "-o", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--format", "int8-dynamic", "--per-token"])
    assert ended.value.code == 0
    (entry,) = surgery.load(str(out)).journal.find("quantize")
    assert entry.options["per_token"] is True
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*given, "--per-token"])
    assert ended.value.code == 2
    assert "--per-token is for int8-dynamic" in capsys.readouterr().err
