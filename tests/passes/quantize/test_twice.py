"""Inputs quantized twice (value and rounding error): the op, its saved tensors, two products in onnxruntime."""

from __future__ import annotations

import itertools

import pytest
import torch

import surgery
from surgery.api import Probe
from surgery.cli import main
from surgery.engine.contract.observe import observe
from surgery.passes.quantize.codes import decode
from surgery.passes.quantize.ops import round_activation
from surgery.testing import check_pass
from tests.conftest import minilm_path
from tests.passes.quantize.test_quantize import KIT
from tests.passes.quantize.test_smooth import DATA, entering, outlying, own_tensors, sites_of
from tests.shared.rounded import check_carried, check_fused, error_under_an_adapter

TWICE = {"target": "attn.*,mlp.*", "format": "int8-dynamic", "twice": True}
ROWS = pytest.mark.parametrize("per_token", [False, True])
# Half a step is 1/254 or 1/255 of a range or a magnitude, and half of a 254th of that is left.
LEFT = 1 / 255 / 254


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return outlying(tmp_path_factory.mktemp("planted"))


def spans(scaled, per_token):
    """Difference between the highest and the lowest level."""
    largest = 2 * scaled.abs().amax(-1, keepdim=True)
    return largest if per_token else scaled.max().clamp(min=0) - scaled.min().clamp(max=0)


# -- the op


@pytest.mark.parametrize(("per_token", "smoothed"), itertools.product((False, True), repeat=2))
def test_sixteen_bits_of_each_value(per_token, smoothed):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32) * torch.logspace(-2, 2, 15).reshape(3, 5, 1)
    smooth = torch.linspace(0.1, 5, 32) if smoothed else None
    factor = torch.ones(32) if smooth is None else smooth
    once, twice = (round_activation(x, smooth, per_token, flag) for flag in (False, True))
    scaled = x / factor
    span = spans(scaled, per_token)
    gone, left = ((rounded - x).abs() / factor for rounded in (once, twice))
    assert bool((gone <= span / 508).all())
    assert float(gone.max() / span.max()) > 1 / 1000  # half a step is reached, nearly
    # A value of float32 has 24 bits, of which the sums of two lose a few.
    assert bool((left <= span / 2 * LEFT * 1.01 + 1e-6 * scaled.abs()).all())


@ROWS
def test_what_one_rounding_keeps_stays(per_token):
    """Zeros, and values on a level, are kept: they have no rounding error."""
    x = torch.tensor([[0.0, 127.0, -64.0, 1.0, -128.0 if not per_token else -127.0]])
    assert torch.equal(round_activation(x, None, per_token, True)[0, 0], torch.tensor(0.0))
    torch.testing.assert_close(round_activation(x, None, per_token, True), x, rtol=1e-6, atol=1e-6)
    assert torch.equal(round_activation(torch.zeros(2, 3), None, per_token, True), torch.zeros(2, 3))


@ROWS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_the_gradient(dtype, per_token):
    x = torch.randn(4, 16).to(dtype).requires_grad_()
    rounded = round_activation(x, None, per_token, True)
    assert rounded.dtype == dtype
    # 16 bits of a range hold what either of them has of its largest values; of small ones float16 has more.
    torch.testing.assert_close(rounded, x.detach(), rtol=1e-2, atol=1e-3)
    (rounded * 3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


# -- in a program


@ROWS
@pytest.mark.parametrize("options", [{}, {"method": "gptq"}, {"smooth": 0.5}])
def test_every_map_is_the_product_of_its_codes(per_token, options, planted):
    """The input's error is negligible, so only the weight's rounding error is left."""
    program = planted.apply(surgery.Quantize(**TWICE, per_token=per_token, **options), data=DATA)
    assert len(sites_of(program)) == 14
    for site, record in sites_of(program):
        own = own_tensors(program, record)
        factor = own.get("smooth", torch.ones(site.in_features))
        given = decode(own["codes"], own["scale"], None, "int8", site.in_features) / factor
        (x,) = entering(program, site, DATA[:1])
        node = site.calls[0].node
        (out,) = Probe(program, DATA[:1]).values([node])[node.name]
        span = spans(x / factor, per_token)
        # What is left of each value, and some roundings of 64 products in float32.
        allowed = (span / 2 * LEFT * 1.01) * (given.abs() @ factor) + 1e-6 * (x.abs() @ given.abs().T)
        assert bool(((out - x @ given.T).abs() <= allowed).all())


def test_the_budget_measures_both_roundings(planted):
    moved = {}
    for twice in (False, True):
        asked = surgery.Quantize(**{**TWICE, "twice": twice}, activation_budget=1.0)
        program = planted.apply(asked, data=DATA)
        moved[twice] = {record.path: record.decided["moved"] for _, record in sites_of(program)}
    assert moved[True].keys() == moved[False].keys()
    for path, once in moved[False].items():
        assert moved[True][path] <= once / 100


def test_saved_merged_and_undone(planted, tmp_path):
    # Steps of int8, of the weight alone.
    check_carried(planted, surgery.Quantize(**TWICE, per_token=True), 0.03, tmp_path / "saved")


def test_trained_rounded_and_converted(planted):
    program = planted.apply(surgery.FakeQuant(**TWICE))
    converted = program.apply(surgery.Convert())
    assert observe(converted.run(), program.run()).equal
    assert observe(converted.run(), planted.apply(surgery.Quantize(**TWICE)).run()).equal
    assert not observe(
        converted.run(), planted.apply(surgery.Quantize(**{**TWICE, "twice": False})).run()
    ).equal


@ROWS
def test_the_kit(planted, per_token):
    pass_ = surgery.Quantize(**TWICE, per_token=per_token)
    report = check_pass(pass_, planted, checks=(*KIT, "second", "reload", "unflatten"))
    assert not report.failed, report


# -- in ONNX


@pytest.mark.parametrize(
    ("per_token", "smooth"),
    [pytest.param(False, 0, marks=pytest.mark.slow), (False, 0.5), (True, 0), (True, 0.5)],
)
def test_two_products_of_integers(per_token, smooth, tmp_path):
    """onnxruntime fuses both; no float weight; the result is closer to weight-only rounding than with one product."""
    path, passed = tmp_path / "model.onnx", surgery.Quantize(**TWICE, per_token=per_token, smooth=smooth)
    # A value between two levels of the second rounding may go either way.
    written = check_fused(passed, path, error=1e-3, products=24)
    assert written["QuantizeLinear"] + written["DynamicQuantizeLinear"] == 2 * 2 * 4  # each input, twice


@ROWS
@pytest.mark.parametrize("dora", [False, True])
def test_exported_under_adapters(per_token, dora, tmp_path):
    """DoRA reads the weight itself, so that its product is of floats."""
    path = tmp_path / "model.onnx"
    assert error_under_an_adapter(dora, path, twice=True, per_token=per_token) <= 1e-3


def test_command_line(tmp_path):
    out = tmp_path / "rows"
    given = ["apply", f"hf:{minilm_path()}", "--pass", "quantize", "--target", "mlp.*", "-o", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--format", "int8-dynamic", "--twice"])
    assert ended.value.code == 0
    (entry,) = surgery.load(str(out)).journal.find("quantize")
    assert entry.options["twice"] is True
