"""Penalties: values and proximal steps by hand, and training on digits where they choose the support."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.api import PassError
from surgery.api.programs import TargetError
from surgery.penalties import group_lasso, l1
from tests.passes.quantize.test_quantize import every
from tests.shared import models
from tests.shared.stacks import digits


def test_values_by_hand():
    """Every form of weight: W x, x W, grouped and transposed convolutions, a table, experts."""
    program = every()
    own = {n: t.detach() for n, t in program.module().named_parameters()}

    def check(penalty, wanted):
        torch.testing.assert_close(penalty().detach(), torch.as_tensor(wanted))

    check(l1(program, "path:linear", 0.1), 0.1 * own["linear.weight"].abs().sum())
    check(l1(program, "all", 2.0), 2 * sum(t.abs().sum() for n, t in own.items() if "bias" not in n))
    check(group_lasso(program, "path:linear", 0.5), 0.5 * 4 * own["linear.weight"].norm(dim=1).sum())
    check(group_lasso(program, "conv1d", 1.0), 12**0.5 * own["conv1d"].norm(dim=0).sum())
    check(group_lasso(program, "conv1d", 1.0, over="columns"), 16**0.5 * own["conv1d"].norm(dim=1).sum())
    check(group_lasso(program, "path:conv", 1.0), 3 * own["conv.weight"].flatten(1).norm(dim=1).sum())
    per_group = own["conv.weight"].view(2, 2 * 9)  # of two groups, each with an input of its own
    check(group_lasso(program, "path:conv", 1.0, over="columns"), 18**0.5 * per_group.norm(dim=1).sum())
    check(
        group_lasso(program, "path:up", 1.0),
        4 * own["up.weight"].transpose(0, 1).flatten(1).norm(dim=1).sum(),
    )
    check(group_lasso(program, "experts", 1.0, over="rows"), 8**0.5 * own["experts"].norm(dim=1).sum())
    blocks = own["linear.weight"].unfold(0, 4, 4).unfold(1, 2, 2)
    check(
        group_lasso(program, "path:linear", 1.0, over="blocks", block="4x2"),
        8**0.5 * blocks.norm(dim=(2, 3)).sum(),
    )


def test_gradient_is_the_norms():
    program = every()
    module = program.module()
    (group_lasso(program, "path:linear", 1.0)() + l1(module, "path:left", 1.0)()).backward()
    weight = module.get_parameter("linear.weight")
    torch.testing.assert_close(weight.grad, 4 * weight.detach() / weight.detach().norm(dim=1, keepdim=True))
    torch.testing.assert_close(
        module.get_parameter("left").grad, module.get_parameter("left").detach().sign()
    )
    with torch.no_grad():
        weight[0] = 0
    weight.grad = None
    group_lasso(program, "path:linear", 1.0)().backward()
    assert not weight.grad[0].any()
    assert weight.grad.isfinite().all()


def test_proximal_steps_by_hand():
    program = every()
    module = program.module()
    linear, conv = module.get_parameter("linear.weight"), module.get_parameter("conv1d")
    before, turned = linear.detach().clone(), conv.detach().clone()
    l1(program, "path:linear", 0.5).prox_(0.2)
    torch.testing.assert_close(linear.detach(), F.softshrink(before, 0.1))
    assert (linear == 0).any()
    norms = turned.norm(dim=0)
    step = float(norms.median())
    penalty = group_lasso(program, "conv1d", 1.0)
    penalty.prox_(step / 12**0.5)
    torch.testing.assert_close(conv.detach(), turned * (1 - step / norms).clamp(min=0))
    assert penalty.zeros() == (int((norms <= step).sum()), 16)


def test_no_way_to_shrink_is_less():
    """The step minimizes ½‖z − w‖² + rate · penalty(z): no nearby point is better."""
    program = every()
    weight = program.module().get_parameter("linear.weight")
    start = weight.detach().clone()
    penalty = group_lasso(program, "path:linear", 0.05, over="blocks", block="2x4")
    penalty.prox_(3.0)
    found = weight.detach().clone()
    assert 0 < penalty.zeros()[0] < penalty.zeros()[1]

    def cost(z):
        with torch.no_grad():
            weight.copy_(z)
            return float((z - start).square().sum() / 2 + 3.0 * penalty())

    least, generator = cost(found), torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            assert cost(found + size * torch.randn(found.shape, generator=generator)) > least


def test_what_the_op_reads_counts():
    """A mask's zeros cost nothing and stay as they are below it; a held value is not shrunk; a part is its rows."""
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    sparse = base.apply(surgery.Sparse(target="out"))
    mask = sparse.tensors["out.sparse.mask"]
    own = sparse.module().get_parameter("out.weight")
    before = own.detach().clone()
    penalty = l1(sparse, "out", 0.1)
    torch.testing.assert_close(penalty().detach(), 0.1 * before[mask].abs().sum())
    penalty.prox_(0.5)
    torch.testing.assert_close(own.detach()[mask], F.softshrink(before[mask], 0.05))
    assert torch.equal(own.detach()[~mask], before[~mask])
    held = base.apply(surgery.Filter(target="out", by="weight", fraction=0.5))
    trains = next(t for n, t in held.tensors.items() if n.endswith("weight_mask"))
    own = held.module().get_parameter("out.weight")
    l1(held, "out", 0.1).prox_(0.5)
    assert torch.equal(own.detach()[~trains], before[~trains])
    assert (own.detach()[trains] != before[trains]).all()
    whole = base.module().get_parameter("project.weight")
    (site,) = [s for s in base.sites if s.role == "attn.qkv"]
    part = whole.detach()[list(site.parts["v"])]
    penalty = group_lasso(base, "attn.v", 1.0)
    torch.testing.assert_close(penalty().detach(), 8**0.5 * part.norm(dim=1).sum())
    rest = whole.detach().clone()
    penalty.prox_(1.0)
    changed = (whole.detach() != rest).any(1).nonzero().flatten().tolist()
    assert changed == sorted(site.parts["v"])


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x.view(-1, 1, 8, 8)))))
        return self.head(x.flatten(1))


def trained(make, steps=150, loss_too=False):
    """Train a program with a penalty or none; returns it with its accuracy on held-out digits."""
    torch.manual_seed(0)
    x, y = digits(1600)
    program = surgery.capture(Digits(), (x[:4],), {"x": {0: "batch"}})
    module, penalty = program.module().train(), make(program) if make else None
    optimiser, rate = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), 0.1
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(0, 1200, (128,), generator=generator)
        loss = F.cross_entropy(module(x[chosen]), y[chosen])
        if penalty and loss_too:
            loss = loss + penalty()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if penalty and not loss_too:
            penalty.prox_(rate)
    module.eval()
    with torch.no_grad():
        right = float((module(x[1200:]).argmax(1) == y[1200:]).float().mean())
    return program, right


@pytest.fixture(scope="module")
def plain():
    return trained(None)


def test_l1_decides_which_values_are_zero(plain):
    base, right = plain
    target = "first,second,head"
    program, accuracy = trained(lambda p: l1(p, target, 5e-3))
    zeros, total = l1(program, target, 1.0).zeros()
    assert l1(base, target, 1.0).zeros()[0] == 0
    assert zeros / total > 0.5
    assert accuracy > right - 0.02
    sparse = program.apply(surgery.Sparse(target=target, threshold=0))
    assert torch.equal(sparse.run(), program.run())
    assert sum(int((~m).sum()) for m in sparse.tensors.values()) == zeros
    # In the loss alone it shrinks values, and leaves hardly any at zero.
    soft, _ = trained(lambda p: l1(p, target, 5e-3), loss_too=True)
    with torch.no_grad():
        assert l1(soft, target, 1.0)() < 0.3 * l1(base, target, 1.0)()
    assert l1(soft, target, 1.0).zeros()[0] < 0.01 * total


def test_group_lasso_decides_which_filters_are_zero(plain):
    base, right = plain
    program, accuracy = trained(lambda p: group_lasso(p, "second", 4e-3))
    gone, filters = group_lasso(program, "second", 1.0).zeros()
    assert group_lasso(base, "second", 1.0).zeros() == (0, 32)
    assert filters == 32
    assert 4 <= gone < 32
    assert accuracy > right - 0.03
    weight = program.state()["second.weight"]
    whole = (weight.flatten(1) == 0).all(1)
    assert int(whole.sum()) == gone
    assert int((weight == 0).sum()) == gone * 16 * 9  # whole filters, and nothing else
    kept = program.apply(surgery.Filter(target="second", source="nonzero"))
    (mask,) = [t for n, t in kept.tensors.items() if "second" in n and "weight_mask" in n]
    assert torch.equal(mask.flatten(), ~whole)


def test_of_a_live_model_and_of_a_copy():
    torch.manual_seed(0)
    model = Digits()
    x, y = digits(64)
    surgery.apply_(model, surgery.Full(), inputs=(x[:4],), dynamic={"x": {0: "batch"}})
    penalty = l1(model, "head", 0.1)
    (F.cross_entropy(model(x), y) + penalty()).backward()
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), model.head.weight)[0]
    torch.testing.assert_close(model.head.weight.grad, plain + 0.1 * model.head.weight.detach().sign())
    penalty.prox_(0.2)
    assert (model.head.weight == 0).any()
    program = surgery.capture(Digits(), (x[:4],), {"x": {0: "batch"}})
    module = copy.deepcopy(program.module())
    l1(module, "head", 0.1).prox_(0.2)
    assert (module.get_parameter("head.weight") == 0).any()
    assert not (program.module().get_parameter("head.weight") == 0).any()


def test_refused():
    module, inputs = models.convnet()
    base = surgery.capture(module, inputs)
    with pytest.raises(TargetError):
        l1(base, "nothing", 0.1)
    for strength in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(PassError, match=r"the strength of a penalty is .*; pass a positive number"):
            l1(base, "conv", strength)
    with pytest.raises(PassError, match="over is 'heads'; use filters, rows, columns or blocks"):
        group_lasso(base, "conv", 0.1, over="heads")
    with pytest.raises(PassError, match="'2:4' is not a block"):
        group_lasso(base, "conv", 0.1, over="blocks", block="2:4")
    with pytest.raises(PassError, match=r"blocks of 4x4 do not divide 8 outputs by 3 inputs"):
        group_lasso(base, "0", 0.1, over="blocks")
    with pytest.raises(PassError, match="a norm has single values and no groups"):
        group_lasso(base, "norm", 0.1)
    assert l1(base, "norm", 0.5)().item() == 4.0
    adapted = base.apply(surgery.Lora(target="head", rank=2))
    with pytest.raises(PassError, match="penalty at 7: its weight is frozen"):
        l1(adapted, "head", 0.1)
    with pytest.raises(PassError, match=r"not a Sequential; make one with surgery.capture\(model, inputs\)"):
        l1(module, "head", 0.1)
    with pytest.raises(PassError, match=r"prox_: the learning rate is .*; pass a positive number"):
        l1(base, "conv", 0.1).prox_(0)
    tuned = base.apply(surgery.SparseTune(target="head"), freeze_base=False)
    with pytest.raises(
        PassError, match="prox_ at 7: a pass computes this weight; add the penalty to the loss"
    ):
        l1(tuned, "head", 0.1).prox_(0.1)
    quantized = base.apply(surgery.Quantize(target="head"))
    with pytest.raises(PassError, match="penalty at 7: its weight is frozen"):
        l1(quantized, "head", 0.1)
