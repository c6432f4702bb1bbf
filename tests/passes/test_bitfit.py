"""BitFit: every bias and nothing else, added biases where the model has none, in graphs and live models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.common.errors import PassError
from surgery.testing import CHECKS, check_pass
from tests.shared import models
from tests.shared.stacks import STACK, bits, digits, fit, moved, program
from tests.techniques.models import program as model

QUICK = [name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx")]


def trains(adapted):
    return {n for n, p in adapted.module().named_parameters() if p.requires_grad}


# -- which


def test_every_bias_and_nothing_else():
    base = program()
    applied = base.apply(surgery.Bitfit())
    assert trains(applied) == {n for n in base.parameter_names() if n.endswith("bias")}
    assert [(e.id, e.auto) for e in applied.journal] == [("freeze", True), ("bitfit", False)]
    assert not applied.tensors
    refused = {p.site.path: p.refusal for p in base.plan(surgery.Bitfit()).passes[-1].refused}
    assert refused == {
        f"blocks.{i}.down": "it has no bias; --add-missing gives it one at zero" for i in range(3)
    }
    assert trains(base.apply(surgery.Bitfit(target="norm"))) == {
        n for n in base.parameter_names() if "norm.bias" in n
    }


def test_a_new_head_trains_whole_and_another_where_it_is_asked(minilm):
    applied = minilm.apply(surgery.Bitfit())
    assert trains(applied) == {n for n in minilm.parameter_names() if n.endswith("bias")} | {
        "classifier.weight"
    }
    whole = program().apply(surgery.Bitfit(train_head=True))
    assert trains(whole) - trains(program().apply(surgery.Bitfit())) == {"head.weight"}


class Adds(nn.Module):
    """Biases that are not arguments of an op: in a sum, cast and viewed; of a layer without its weight; of an LSTM."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.shift = nn.Parameter(torch.randn(8))
        self.channel = nn.Parameter(torch.randn(1, 5, 1))
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.gain = nn.Parameter(torch.ones(8))
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1))
        self.out = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = x @ self.weight * (1 + self.gain) + self.shift.double().to(x.dtype)
        x = torch.tanh(x) + self.channel + self.positions
        x = x + self.lstm(x)[0]
        return self.out(self.conv(x.transpose(1, 2)).transpose(1, 2))


def test_biases_that_no_op_takes_as_one():
    base = surgery.capture(Adds(), torch.randn(3, 5, 8), dynamic={"x": {0: "batch"}})
    applied = base.apply(surgery.Bitfit())
    assert trains(applied) == {"shift", "channel", "lstm.bias_ih_l0", "lstm.bias_hh_l0", "conv.bias"}
    where = {r.path: r.decided["biases"] for r in applied.journal.entries[-1].sites}
    assert where["weight"][0] == "shift"
    assert where["conv"] == ["conv.bias"]
    added = base.apply(surgery.Bitfit(add_missing=True))
    assert list(added.tensors) == ["out.bitfit.bias"]


# -- added


def test_missing_biases_start_at_zero_exactly():
    base = program()
    applied = base.apply(surgery.Bitfit(add_missing=True))
    assert list(applied.tensors) == [f"blocks.{i}.down.bitfit.bias" for i in range(3)]
    assert all(not t.any() for t in applied.tensors.values())
    assert torch.equal(applied.run(), base.run())
    assert applied.journal.entries[-1].numerics["observed"] == "bit for bit"


@pytest.mark.parametrize("factory", [models.forms, models.experts, models.attention, models.convnet])
def test_every_form_of_weight(factory, randomise):
    """An added bias acts like a bias of the op: compared with hand-made ones below."""
    base = surgery.capture(*factory())
    applied = base.apply(surgery.Bitfit(add_missing=True))
    assert torch.equal(applied.run(), base.run())
    assert not (applied.tensors and torch.equal(randomise(applied, 0.3).run(), base.run()))
    assert trains(applied) >= set(applied.tensors)


class Bare(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2, bias=bias)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias)
        self.line = nn.Conv1d(6, 3, 3, bias=bias)
        self.out = nn.Linear(6, 5, bias=bias)

    def forward(self, x):
        x = self.up(F.gelu(self.conv(x)))
        return self.out(F.gelu(self.line(x.flatten(2))[..., :6]))


def test_an_added_bias_is_that_of_the_op():
    torch.manual_seed(0)
    bare, biased = Bare(False), Bare(True)
    biased.load_state_dict(bare.state_dict(), strict=False)
    x = torch.randn(2, 2, 6, 6)
    applied = surgery.capture(bare, x).apply(surgery.Bitfit(add_missing=True))
    assert {n: tuple(t.shape) for n, t in applied.tensors.items()} == {
        f"{n}.bitfit.bias": tuple(biased.get_parameter(f"{n}.bias").shape)
        for n in ("conv", "up", "line", "out")
    }
    with torch.no_grad():
        for name, tensor in applied.tensors.items():
            tensor.copy_(biased.get_parameter(name.replace(".bitfit", "")))
    # The bias is added to a finished sum here and within it there: one rounding of a few fp32 layers.
    assert torch.allclose(applied.run(), biased(x), atol=1e-5)


def test_stacked_experts_get_a_bias_each():
    module, inputs = models.experts()
    applied = surgery.capture(module, inputs).apply(surgery.Bitfit(add_missing=True, target="up,down"))
    with torch.no_grad():
        for tensor in applied.tensors.values():
            tensor.normal_()
    up, down = applied.tensors["up_bitfit.bias"], applied.tensors["down_bitfit.bias"]
    assert (up.shape, down.shape) == ((4, 16), (4, 8))
    (x,) = inputs
    best = module.router(x).argmax(-1)
    hidden = torch.bmm(module.up[best], x.unsqueeze(-1)).squeeze(-1) + up[best]
    expected = x + torch.bmm(F.gelu(hidden).unsqueeze(1), module.down[best]).squeeze(1) + down[best]
    assert torch.allclose(applied.run(), expected, atol=1e-5)


def test_before_a_batch_norm_there_is_no_use_for_a_bias():
    """In train mode its gradient is zero, since the norm subtracts the mean. The norm's own bias trains."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )
    x = torch.randn(3, 3, 6, 6)
    net(x)
    base = surgery.capture(net, x)
    applied = base.apply(surgery.Bitfit(add_missing=True))
    assert not applied.tensors
    assert trains(applied) == {"1.bias", "4.bias"}
    with pytest.raises(
        PassError, match=r"^bitfit: nothing that --target path:0 names has a bias, or a use for one"
    ):
        base.apply(surgery.Bitfit(add_missing=True, target="path:0"))


# -- refused


def test_a_model_without_biases_says_what_to_do():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    base = surgery.capture(net, torch.randn(3, 4))
    says = r"^bitfit at 0: refused, it has no bias; --add-missing gives it one at zero \(and 1 more\)"
    with pytest.raises(PassError, match=says):
        base.apply(surgery.Bitfit())
    with pytest.raises(PassError, match=r"no option --add-mising; did you mean 'add_missing'"):
        surgery.Bitfit.parse({"add-mising": True})


# -- in, out, merged


def test_merging_keeps_what_was_trained_and_says_what_it_cannot_fold():
    base = program()
    trained = base.apply(surgery.Bitfit())
    fit(trained, 6)
    merged = trained.merge()
    assert torch.equal(merged.run(), trained.run())
    assert set(merged.state()) == set(base.state())
    assert torch.equal(merged.undo("merge").run(), trained.run())
    added = base.apply(surgery.Bitfit(add_missing=True))
    with pytest.raises(
        PassError,
        match=r"nothing can be folded \(bitfit: blocks\.0\.down: the base has no bias that could hold",
    ):
        added.merge()
    # An adapter below an added bias folds; the bias stays where it is.
    both = base.apply(surgery.Lora(target="mlp.down", rank=2)).apply(surgery.Bitfit(add_missing=True))
    fit(both, 4)
    kept = both.merge()
    assert kept.journal.entries[-1].options["folded"] == ["lora"]
    assert torch.allclose(kept.run(), both.run(), atol=1e-5)


def test_two_of_them_beside_an_adapter(randomise):
    """The second names what the first did: undoing either keeps what the other trains."""
    base = program()
    applied = base.apply(surgery.Lora(target="mlp.*", rank=2), surgery.Bitfit())
    again = applied.apply(surgery.Bitfit(target="norm", label="again"))
    assert trains(again) == trains(applied)
    before = bits(applied)
    fit(again, 4)
    left = again.undo("again")
    assert moved(left, before) == trains(applied)
    assert not moved(left.undo("bitfit").undo("lora"), bits(base))


@pytest.mark.parametrize("options", [{}, {"add_missing": True}])
def test_a_trained_model_learns_to_read_brighter_digits(options):
    """Biases adapt what is there: of a net that knows digits, to digits that are shifted and scaled."""
    known = program()
    assert fit(known, 80)[-1] < 0.3
    x, y = digits()
    brighter = (0.6 * x + 1.0, y)
    applied = known.apply(surgery.Bitfit(**options))
    before = bits(applied)
    losses = fit(applied, 40, data=brighter)
    assert losses[0] > 1
    assert losses[-1] < 0.4 * losses[0], losses[::8]
    assert moved(applied, before) == trains(applied)
    assert all(n.endswith("bias") for n in trains(applied))
    assert not moved(applied.undo("bitfit"), bits(known))


def test_it_learns_in_train_mode():
    applied = surgery.load("py:tests.shared.models:convnet").apply(surgery.Bitfit())
    module = applied.module().train()
    (x,), _ = applied.example_inputs
    target = torch.randn(3, 4)
    optimiser = torch.optim.Adam(applied.parameter_groups(0.05))
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = F.mse_loss(module(x), target)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


# -- the kit


@pytest.mark.parametrize("options", [{}, {"add_missing": True}])
def test_the_whole_kit(options):
    report = check_pass(surgery.Bitfit(**options), surgery.load(STACK))
    assert report.ok
    assert "another process" in report.passed["reload"]
    assert "bit for bit" in report.passed["numerics"]
    assert ("merge" in report.skipped) is bool(options)
    if options:
        assert "3 tensors by name" in report.passed["onnx"]


@pytest.mark.slow
def test_the_whole_kit_on_t5():
    report = check_pass(surgery.Bitfit(add_missing=True, target="attn.q,attn.v,mlp.down"), model("t5"))
    assert report.ok
    assert "another process" in report.passed["reload"]


@pytest.mark.parametrize("factory", [models.forms, models.experts, models.convnet])
def test_the_kit_on_every_form(factory):
    for options in ({}, {"add_missing": True}):
        assert check_pass(surgery.Bitfit(**options), surgery.capture(*factory()), checks=QUICK).ok


@pytest.mark.slow
@pytest.mark.parametrize(
    "which", ["minilm", "smollm2", "t5", "vit", "resnet18", "wav2vec2", "mixtral", "mamba"]
)
def test_the_kit_on_every_model(which):
    assert check_pass(surgery.Bitfit(add_missing=True), model(which)).ok
