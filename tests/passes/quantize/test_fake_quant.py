"""fake-quant and convert: trained with rounding, then converted to codes with the same outputs bit for bit."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import surgery
from surgery.api import PassError
from surgery.common.errors import ExportError, JournalError
from surgery.engine.contract.observe import observe
from surgery.testing import check_pass
from tests.passes.quantize.test_quantize import KIT, every, randomise

FORMATS = ["int8", "int4", "nf4", "ternary", "binary"]
TRAINED = (*KIT, "merge", "restored")


def steps(program, inputs, count=2):
    """Some steps that reduce the outputs: every weight moves."""
    module = program.module()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(count):
        optimiser.zero_grad()
        out = module(*inputs)
        loss = sum(o.square().mean() for o in (out if isinstance(out, tuple) else (out,)))
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("format", FORMATS)
def test_convert_gives_the_same_to_the_bit(format, tmp_path):
    base = every()
    rounded = base.apply(surgery.FakeQuant(target="all", format=format, group=0))
    quantized = base.apply(surgery.Quantize(target="all", format=format, group=0))
    assert observe(quantized.run(), rounded.run()).equal
    steps(rounded, base.example_inputs[0])
    converted = rounded.apply(surgery.Convert())
    assert converted.journal.entries[-1].numerics == {"declared": "exact", "observed": "bit for bit"}
    assert not observe(converted.run(), quantized.run()).equal
    assert observe(converted.undo("convert").run(), rounded.run()).equal
    with pytest.raises(JournalError, match=r"'convert' depends on 'fake-quant'; undo 'convert' first"):
        converted.undo("fake-quant")
    with pytest.raises(ExportError, match="apply --pass convert, or merge"):
        rounded.export(tmp_path / "rounded.onnx")
    assert converted.export(tmp_path / "model.onnx").parity.error <= 1e-5


@pytest.mark.parametrize("format", ["int4", "int8-dynamic"])
def test_conformance(format):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32)).to(torch.float32).eval()
    base = surgery.capture(module, (torch.randn(4, 64),))
    for given, program in (
        (surgery.FakeQuant(target="all", format=format), base),
        (surgery.Convert(), base.apply(surgery.FakeQuant(target="all", format=format))),
    ):
        report = check_pass(given, program, checks=TRAINED)
        assert not report.failed, report


def test_merged_weights_are_the_rounded_ones():
    base = every()
    program = base.apply(
        surgery.FakeQuant(target="all", format="ternary"), surgery.Lora(target="all", rank=2)
    )
    program = randomise(program)
    merged = program.merge()
    assert observe(program.run(), merged.run()).difference <= 1e-5
    assert len(merged.without("lora").folded()["linear.weight"].unique()) == 3


def test_refused():
    base = every()
    with pytest.raises(PassError, match="convert needs fake-quant in the program"):
        base.apply(surgery.Convert())
    rounded = base.apply(surgery.FakeQuant(target="path:linear"))
    with pytest.raises(PassError, match="'fake-quant' has quantized it already; undo that first"):
        rounded.apply(surgery.Quantize(target="path:linear"))
    converted = rounded.apply(surgery.Convert())
    with pytest.raises(PassError, match="'convert' has quantized it already"):
        converted.apply(surgery.Convert(label="again"))
    plan = base.plan(surgery.Quantize(target="all", format="int8-dynamic"))
    reasons = {row.site.path: row.refusal for row in plan.passes[-1].refused}
    assert "this is a conv weight; quantize it to int8 in another pass" in reasons["conv"]
    assert "its weight on the left" in reasons["left"]
    with pytest.raises(PassError, match="int8-dynamic has one scale for each row; leave out --group"):
        surgery.Quantize.parse({"target": "all", "format": "int8-dynamic", "group": 32})


RAMP = {"format": "int4", "group": 0, "schedule": "linear", "begin": 2, "end": 6, "every": 2}


def test_rounded_by_and_by(tmp_path):
    """Nothing at first, all of it at the end, to the bit; halfway it is the mean of both."""
    base = every()
    inputs = base.example_inputs[0]
    program = base.apply(surgery.FakeQuant(target="all", **RAMP))
    assert observe(program.run(), base.run()).equal
    module, seen = program.module(), []
    weight = module.get_parameter("linear.weight")
    for step in range(8):
        assert module.advance(step)
        seen.append(float(program.tensors["linear.fake-quant.share"]))
        if step == 4:
            half, own = program.merge().folded()["linear.weight"], weight.detach()
            whole = base.apply(surgery.FakeQuant(target="path:linear", format="int4", group=0))
            torch.testing.assert_close(half, (own + whole.merge().folded()["linear.weight"]) / 2)
            assert observe(program.run(), program.merge().run()).difference <= 1e-5
            with pytest.raises(PassError, match="has moved it 50% of the way to its codes; train to the end"):
                program.apply(surgery.Convert())
            program.save(tmp_path / "half")
            assert observe(surgery.load(str(tmp_path / "half"), base=base).run(), program.run()).equal
    assert seen == [0, 0, 0, 0, 0.5, 0.5, 1, 1]
    module.advance(0)
    assert float(program.tensors["linear.fake-quant.share"]) == 1
    assert observe(
        program.run(), base.apply(surgery.FakeQuant(target="all", format="int4", group=0)).run()
    ).equal
    steps(program, inputs)
    converted = program.apply(surgery.Convert())
    assert converted.journal.entries[-1].numerics == {"declared": "exact", "observed": "bit for bit"}


def test_the_gradient_is_that_of_the_weight_all_along_the_schedule():
    base = every()
    program = base.apply(surgery.FakeQuant(target="path:linear", **RAMP))
    module = program.module()
    module.advance(4)
    node = next(n for n in program.graph.nodes if "fake_quantize" in str(n.target))
    weight = module.get_parameter("linear.weight")
    rounded = node.target(weight, *node.args[1:6], program.tensors["linear.fake-quant.share"])
    given = torch.randn(rounded.shape)
    (found,) = torch.autograd.grad(rounded, weight, given)
    assert torch.equal(found, given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"end": 5}, "--end is for a schedule; add --schedule linear"),
        ({"schedule": "linear"}, "a schedule needs an --end after its --begin of 0"),
        ({"schedule": "linear", "begin": 5, "end": 5}, "an --end after its --begin of 5"),
        (
            {"schedule": "linear", "end": 5, "format": "int8-dynamic"},
            "int8-dynamic rounds them; use --format int8",
        ),
    ],
)
def test_schedules_refused(options, said):
    with pytest.raises(PassError, match=said):
        surgery.FakeQuant.parse({"target": "all", **options})


class Digits(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def test_training_makes_up_for_ternary_weights():
    """On scikit-learn's digits: rounded after training, a network of signs is worse than one trained so."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    held = slice(1300, None)
    torch.manual_seed(0)

    def fit(program, epochs, rate):
        module = program.module().train()
        optimiser = torch.optim.Adam(module.parameters(), lr=rate)
        for _ in range(epochs):
            for rows in torch.randperm(1300).split(100):
                optimiser.zero_grad()
                nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
                optimiser.step()
        module.eval()
        return program

    def accuracy(program):
        return float((program.run(x[held]).argmax(1) == y[held]).float().mean())

    base = surgery.capture(Digits(), (x[:2],))
    floats = fit(base.apply(surgery.Full()), 20, 3e-3)
    after = floats.apply(surgery.Quantize(target="all", format="ternary"))
    aware = fit(floats.apply(surgery.FakeQuant(target="all", format="ternary")), 20, 1e-3)
    converted = aware.apply(surgery.Convert())
    assert accuracy(floats) > 0.9
    assert accuracy(after) < accuracy(floats) - 0.03
    assert accuracy(converted) > accuracy(after) + 0.03
    assert observe(aware.run(x[held]), converted.run(x[held])).equal


def test_the_kit_on_a_tied_weight_that_is_not_rounded():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)
    ).eval()
    module[2].weight = module[0].weight
    base = surgery.capture(module, (torch.randn(4, 32),))
    rounded = base.apply(surgery.FakeQuant(target="path:4", format="int8"))
    report = check_pass(surgery.Convert(), rounded, checks=("tied",))
    assert report.skipped["tied"] == "the pass passes tied weights over"
