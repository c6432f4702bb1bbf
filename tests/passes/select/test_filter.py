"""Filters under gradient masks: their selection, on every form of weight, and after L1 and group lasso."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.common.errors import PassError
from surgery.testing import CHECKS, check_pass
from tests.shared import models
from tests.shared.stacks import bits, digits, fit, moved, program
from tests.techniques.models import program as model

QUICK = [name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx")]


def mask_of(applied, name):
    """The full mask of a parameter; without a mask, all True if it trains and else all False."""
    shape = applied.state()[name].shape
    if name not in applied.schedule.masks:
        return torch.full(shape, applied.trains(name))
    return applied.tensors[applied.schedule.masks[name]].expand(shape)


# -- which are chosen


def test_the_largest_filters_of_each_weight_and_their_biases():
    base = program()
    applied = base.apply(surgery.Filter(fraction=0.25))
    for name in ("embed", "blocks.1.up"):
        weight = base.state()[f"{name}.weight"]
        norms = weight.abs().sum(1)
        largest = norms >= norms.sort(descending=True).values[len(norms) // 4 - 1]
        mask = mask_of(applied, f"{name}.weight")
        assert torch.equal(mask, largest[:, None].expand_as(weight))
        assert torch.equal(mask_of(applied, f"{name}.bias"), largest)
        assert applied.tensors[applied.schedule.masks[f"{name}.weight"]].shape == (len(norms), 1)
    assert not applied.trains("head.weight")
    assert not applied.trains("norm.weight")


def test_single_weights():
    applied = program().apply(surgery.Filter(by="weight", count=7))
    for i in range(3):
        weight = applied.state()[f"blocks.{i}.up.weight"].abs()
        mask = mask_of(applied, f"blocks.{i}.up.weight")
        assert mask.sum() == 7
        assert weight[mask].min() >= weight[~mask].max()
        assert not applied.trains(f"blocks.{i}.up.bias")


SHARES = {
    "a tenth": ({}, 2),
    "rounded up": ({"fraction": 0.13}, 3),
    "exact": ({"fraction": 0.125}, 2),
    "one at least": ({"fraction": 1e-6}, 1),
    "counted": ({"count": 5}, 5),
    "no more than there are": ({"count": 99}, 16),
}


@pytest.mark.parametrize("name", SHARES)
def test_how_many(name):
    options, expected = SHARES[name]
    applied = program().apply(surgery.Filter(target="path:embed", **options))
    assert mask_of(applied, "embed.bias").sum() == expected


def test_equal_norms_give_one_choice():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.ones_(net[0].weight)
    base = surgery.capture(net, torch.randn(3, 4))
    applied = base.apply(surgery.Filter(target="path:0", count=2))
    assert mask_of(applied, "0.bias").tolist() == [True, True, False, False, False, False]


def test_every_form_of_weight():
    """Rows as outputs, whatever the layout: addmm and matmul store (in, out), convolutions have groups."""
    base = surgery.capture(*models.forms())
    applied = base.apply(surgery.Filter(count=1))
    outputs = {"linear.weight": 0, "addmm_weight": 1, "matmul_weight": 1, "transposed": 0, "conv1.weight": 0,
               "conv2.weight": 0, "depthwise.weight": 0}  # fmt: skip
    for name, axis in outputs.items():
        size = base.state()[name].abs()
        norms = size.movedim(axis, 0).flatten(1).sum(1)
        mask = mask_of(applied, name).movedim(axis, 0)
        assert mask.flatten(1).all(1).tolist() == [i == int(norms.argmax()) for i in range(len(norms))], name
        assert mask.flatten(1).any(1).sum() == 1
    assert mask_of(applied, "addmm_bias").sum() == 1
    assert not applied.trains("embed.weight")  # of the embedding, and of the head that is tied to it


def test_transposed_convolutions_with_groups():
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten(), nn.LazyLinear(2))
    inputs = torch.randn(2, 4, 5, 5)
    net(inputs)
    base = surgery.capture(net, inputs)
    applied = base.apply(surgery.Filter(target="path:0", count=1))
    weight = base.state()["0.weight"]  # (in, out / groups, 3, 3)
    norms = weight.abs().view(2, 2, 3, 9).sum((1, 3)).flatten()
    best = int(norms.argmax())
    assert mask_of(applied, "0.bias").nonzero().tolist() == [[best]]
    expected = torch.zeros(2, 2, 3, 9, dtype=torch.bool)
    expected[best // 3, :, best % 3] = True
    assert torch.equal(mask_of(applied, "0.weight"), expected.view(weight.shape))
    before = bits(applied)
    module = applied.module()
    module(inputs).square().sum().backward()
    torch.optim.SGD(applied.parameter_groups(0.1)).step()
    changed = {n: applied.state()[n] != before[n] for n in ("0.weight", "0.bias")}
    assert torch.equal(changed["0.weight"], expected.view(weight.shape))
    # The one output channel that moved is that of the filter.
    apart = (module(inputs) != base.run(inputs)).any()
    assert apart
    with torch.no_grad():
        hidden = F.conv_transpose2d(inputs, applied.state()["0.weight"], applied.state()["0.bias"], groups=2)
        was = net[0](inputs)
    assert (hidden != was).flatten(2).any(2).any(0).nonzero().flatten().tolist() == [best]


def test_experts_have_filters_each():
    base = surgery.capture(*models.experts())
    applied = base.apply(surgery.Filter(target="up,down", count=2))
    up = base.state()["up"]  # (experts, out, in): W @ x
    assert mask_of(applied, "up").all(2).sum(1).tolist() == [2, 2, 2, 2]
    best = up.abs().sum(2).topk(2).indices.sort().values
    assert mask_of(applied, "up")[..., 0].nonzero()[:, 1].view(4, 2).tolist() == best.tolist()
    assert mask_of(applied, "down").all(1).sum(1).tolist() == [2, 2, 2, 2]  # (experts, in, out): x @ W


def test_half_precision_norms_do_not_overflow():
    net = nn.Sequential(nn.Linear(4096, 4), nn.ReLU(), nn.Linear(4, 2)).half()
    with torch.no_grad():
        net[0].weight.fill_(30)  # 4096 · 30 is more than a half holds
        net[0].weight[2] = 31
    applied = surgery.capture(net, torch.randn(2, 4096).half()).apply(
        surgery.Filter(target="path:0", count=1)
    )
    assert mask_of(applied, "0.bias").tolist() == [False, False, True, False]


# -- what sparse training left


def lasso(groups: bool):
    """A program trained on digits with a proximal penalty on the first layer: exact zeros, single or in rows."""
    base = program().apply(surgery.Full())
    module, (x, y) = base.module(), digits()
    optimiser = torch.optim.SGD(base.parameter_groups(0.1), momentum=0.9)
    weight, bias = module.get_parameter("embed.weight"), module.get_parameter("embed.bias")
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
        with torch.no_grad():
            if groups:
                norm = weight.norm(dim=1, keepdim=True)
                weight.mul_((1 - 0.1 / norm.clamp_min(1e-12)).clamp_min(0))
                bias.mul_((norm > 0.1).flatten())
            else:
                weight.copy_(weight.sign() * (weight.abs() - 0.004).clamp_min(0))
    return base


def test_what_l1_left_trains_and_the_rest_stays_pruned():
    base = lasso(groups=False)
    zero = base.state()["embed.weight"].detach() == 0
    assert 0.2 < zero.float().mean() < 0.95
    applied = base.apply(surgery.Filter(target="path:embed", source="nonzero", by="weight"))
    assert torch.equal(mask_of(applied, "embed.weight"), ~zero)
    losses = fit(applied, 20)
    assert losses[-1] < losses[0]
    now = applied.state()["embed.weight"].detach()
    assert torch.equal(now == 0, zero)
    assert (now != base.state()["embed.weight"])[~zero].float().mean() > 0.95


def test_what_group_lasso_left_trains_with_its_biases():
    base = lasso(groups=True)
    weight = base.state()["embed.weight"].detach()
    dead = (weight == 0).all(1)
    assert dead.any()
    assert not dead.all()
    applied = base.apply(surgery.Filter(target="path:embed", source="nonzero"))
    assert torch.equal(mask_of(applied, "embed.weight"), ~dead[:, None].expand_as(weight))
    assert torch.equal(mask_of(applied, "embed.bias"), ~dead)
    before = bits(applied)
    fit(applied, 5)
    assert moved(applied, before) == {"embed.weight", "embed.bias"}
    assert torch.equal((applied.state()["embed.weight"] == 0).all(1), dead)


def test_a_threshold_says_what_counts_as_zero():
    base = program()
    applied = base.apply(surgery.Filter(target="path:embed", source="nonzero", by="weight", threshold=0.1))
    assert torch.equal(mask_of(applied, "embed.weight"), base.state()["embed.weight"].abs() > 0.1)


BAD = {
    "two numbers": ({"fraction": 0.1, "count": 3}, "--fraction and --count both set how many train"),
    "a number of what is there": ({"source": "nonzero", "count": 3}, "leave out --fraction and --count"),
    "a threshold of norms": (
        {"threshold": 0.1},
        "--threshold is for --source nonzero; add that",
    ),
    "more than all": ({"fraction": 1.5}, "--fraction is 1.5: input should be less than or equal to 1"),
    "by": ({"by": "row"}, "--by is 'row': input should be 'filter' or 'weight'"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_options(name):
    options, says = BAD[name]
    with pytest.raises(PassError, match=f"pass 'filter'.*{says}"):
        surgery.Filter.parse(options)


def test_nothing_to_choose_from():
    with pytest.raises(
        PassError, match=r"^filter: the target names no conv, linear or expert weight; .*--target head"
    ):
        program().apply(surgery.Filter(target="norm"))
    says = r"^filter: no filter of the 11 targeted parameters is zero .*L1 or group-lasso penalty first.*--source norm"
    with pytest.raises(PassError, match=says):
        program().apply(surgery.Filter(source="nonzero"))
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.zeros_(net[0].weight)
    with pytest.raises(PassError, match=r"^filter: all targeted values are zero, so nothing would train"):
        surgery.capture(net, torch.randn(3, 4)).apply(surgery.Filter(target="path:0", source="nonzero"))
    assert mask_of(program().apply(surgery.Filter(target="head", count=2)), "head.bias").sum() == 2


# -- it learns, is counted, and passes the kit


@pytest.mark.parametrize(
    "options", [{"fraction": 0.25}, {"by": "weight", "fraction": 0.1}], ids=["filter", "weight"]
)
def test_the_loss_on_digits_falls_and_the_rest_is_held(options):
    applied = program().apply(surgery.Filter(**options))
    before = bits(applied)
    losses = fit(applied, 40, lr=2e-2)
    assert losses[-1] < 0.75 * losses[0], losses[::8]
    for name, was in before.items():
        mask = mask_of(applied, name)
        now = applied.state()[name].detach()
        assert torch.equal(now[~mask].view(torch.uint8), was[~mask].view(torch.uint8)), name
    assert moved(applied, before) == {n for n in applied.parameter_names() if applied.trains(n)}


def test_only_what_the_masks_let_train_is_counted():
    applied = program().apply(surgery.Filter(target="path:embed", fraction=0.25))
    assert applied.count_parameters() == (4506, 4 * 64 + 4)
    assert (
        program().apply(surgery.Filter(target="path:embed", by="weight", count=5)).count_parameters()[1] == 5
    )


def test_the_whole_kit_on_vit():
    report = check_pass(surgery.Filter(fraction=0.25), model("vit"))
    assert report.ok
    assert "another process" in report.passed["reload"]


@pytest.mark.parametrize("options", [{}, {"by": "weight", "fraction": 0.05}], ids=["filter", "weight"])
def test_the_kit_on_resnet(options):
    report = check_pass(
        surgery.Filter(**options), model("resnet18"), checks=["undo", "gradients", "held", "input"]
    )
    assert report.ok


@pytest.mark.slow
@pytest.mark.parametrize("which", ["minilm", "smollm2", "t5", "wav2vec2", "mixtral", "mamba"])
@pytest.mark.parametrize("by", ["filter", "weight"])
def test_the_kit_on_other_models(which, by):
    assert check_pass(surgery.Filter(by=by), model(which), checks=[*QUICK, "reload"]).ok
