"""Mistakes that an author makes and that one small program hides: the kit finds each, on its own models if need be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import api
from surgery.api import (
    ADAPTER,
    LINEAR,
    Fold,
    RewritePass,
    ScaleAxis,
    TensorSpec,
    WeightOp,
    hookimpl,
)
from surgery.api.programs import make_plugin_manager
from surgery.passes.algebra.low_rank import AddLowRank, branch
from surgery.testing import CHECKS, ConformanceError, check_pass

aten = torch.ops.aten
QUICK = [name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx")]


class Scale(RewritePass):
    """Right in everything: each output feature times s, of a chosen part too."""

    name: ClassVar[str] = "planted"
    on: ClassVar[tuple[str, ...]] = (LINEAR,)
    effect = replace(ADAPTER, scalable=True, partial=True)

    def tensors(self, site):
        return {"s": TensorSpec((site.out_features,), nn.init.zeros_)}

    def factor(self, site, s: Tensor) -> Tensor:
        chosen = torch.zeros_like(s)
        chosen[self.chosen(site)] = 1
        return 1 + s * chosen

    def chosen(self, site) -> list[int]:
        parts = site.decided["parts"]
        return parts if parts is not None else list(range(site.out_features))

    def decide(self, site):
        wanted = [f for part in site.selected_parts for f in site.parts[part]]
        return {"parts": wanted or None}

    def rewrite(self, site, g):
        index = g.call(aten.mul.Tensor, g["s"], self.mask(site, g))
        factor = g.call(aten.add.Scalar, g.call(aten.mul.Scalar, index, g.weight), 1.0)
        return g.call(aten.mul.Tensor, g.output, factor)

    def mask(self, site, g):
        chosen = set(self.chosen(site))
        row = [1.0 if f in chosen else 0.0 for f in range(site.out_features)]
        zero = g.call(aten.mul.Scalar, g.call(aten.detach.default, g["s"]), 0.0)
        if len(chosen) == site.out_features:
            return g.call(aten.add.Scalar, zero, 1.0)
        ones = [
            g.call(aten.add.Scalar, g.call(aten.slice.Tensor, zero, 0, i, i + 1), v)
            for i, v in enumerate(row)
        ]
        return g.call(aten.cat.default, ones, 0)

    def merge(self, site, tensors, weight):
        factor = self.factor(site, weight * tensors["s"])
        return {"weight": ScaleAxis(site, factor), "bias": ScaleAxis(site, factor, bias=True)}


class ForgetsBias(Scale):
    """The merge forgets the bias, which is zero in every new model."""

    def merge(self, site, tensors, weight):
        return {"weight": super().merge(site, tensors, weight)["weight"]}


class IgnoresParts(Scale):
    """It says that it can act on parts, and scales all of them."""

    def decide(self, site):
        return {"parts": None}


@dataclass(frozen=True)
class Rows(Fold):
    """Merge: multiplies the first axis, which is the output only where the weight is stored out × in."""

    factor: Tensor

    def apply(self, weight, original):
        if weight.shape[0] != len(self.factor):
            return weight.mul_(self.factor)
        return weight.mul_(self.factor.reshape(-1, *(1 for _ in weight.shape[1:])))


class WrongTransposed(Scale):
    """Right for nn.Linear, wrong for a square weight that is stored in × out."""

    def merge(self, site, tensors, weight):
        factor = self.factor(site, weight * tensors["s"])
        return {"weight": Rows(factor), "bias": ScaleAxis(site, factor, bias=True)}


@torch.library.custom_op("surgery_planted::scale", mutates_args=())
def scale_op(x: Tensor, s: Tensor) -> Tensor:
    return x * s


@scale_op.register_fake
def _(x, s):
    return x * s


def _two_percent(ctx, grad):
    x, s = ctx.saved_tensors
    return grad * s, 1.02 * (grad * x).flatten(0, -2).sum(0)


scale_op.register_autograd(
    _two_percent, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class WrongGradient(RewritePass):
    """The formula that it registers for its op is 2% wrong."""

    name: ClassVar[str] = "planted"
    on: ClassVar[tuple[str, ...]] = (LINEAR,)

    def tensors(self, site):
        return {"s": TensorSpec((site.out_features,), nn.init.ones_)}

    def rewrite(self, site, g):
        return g.call(torch.ops.surgery_planted.scale.default, g.output, g["s"])


class BatchMean(RewritePass):
    """It adds a share of the mean over the batch."""

    name: ClassVar[str] = "planted"
    on: ClassVar[tuple[str, ...]] = (LINEAR,)

    def tensors(self, site):
        return {"s": TensorSpec((site.out_features,), nn.init.zeros_)}

    def rewrite(self, site, g):
        mean = g.call(aten.mean.dim, g.output, [0], True)
        return g.call(aten.add.Tensor, g.output, g.call(aten.mul.Tensor, mean, g["s"]))


class DropsBeneath(RewritePass):
    """A change of the outputs that is declared, computed from the op's bare input."""

    name: ClassVar[str] = "planted"
    numerics = api.changes("it rounds")
    effect = api.WEIGHT

    def rewrite(self, site, g):
        return g.call(aten.mul.Scalar, g.call_op_on(g.x), 1.25)


class HalfBranch(RewritePass):
    """LoRA whose gradient of A is 2% off, hidden behind the larger one of B."""

    name: ClassVar[str] = "planted"
    on: ClassVar[tuple[str, ...]] = (LINEAR,)
    effect = replace(ADAPTER, scalable=True)

    def tensors(self, site):
        return {
            "A": TensorSpec((2, site.in_features), nn.init.normal_),
            "B": TensorSpec((site.out_features, 2), nn.init.zeros_),
        }

    def rewrite(self, site, g):
        part = g.call(aten.mul.Scalar, g.call(aten.detach.default, g["A"]), 0.02)
        rest = g.call(aten.mul.Scalar, g["A"], 0.98)
        added = branch(site, g, g.call(aten.add.Tensor, rest, part), g["B"])
        return g.call(aten.add.Tensor, g.output, g.call(aten.mul.Scalar, added, g.weight))

    def merge(self, site, tensors, weight):
        return {"weight": AddLowRank(site, tensors["A"], tensors["B"], weight)}


def program_for(*classes, net: nn.Module | None = None) -> surgery.Program:
    """A program without anything that would show the faults: no bias, no fused layer, square weights out × in."""

    class Plugin:
        @staticmethod
        @hookimpl
        def surgery_passes():
            return list(classes)

    torch.manual_seed(0)
    if net is None:
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        for layer in (net[0], net[2]):
            nn.init.zeros_(layer.bias)
    plugins = make_plugin_manager(plugins=(Plugin,))
    return surgery.capture(net.eval(), torch.randn(4, 6), plugins=plugins)


PLANTED = {
    ForgetsBias: ("merge", "merging moves the outputs"),
    IgnoresParts: ("zoo", "moves the other parts"),
    WrongTransposed: ("zoo", "merging moves the outputs"),
    WrongGradient: ("gradients", "a gradient is wrong"),
    HalfBranch: ("zoo", "that of 'A' differs from central differences by 2.0%"),
    BatchMean: ("rows", "when the other rows of the batch change"),
    DropsBeneath: ("foreign", "without effect"),
}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda cls: cls.__name__)
def test_a_planted_mistake_is_found(fault):
    check, says = PLANTED[fault]
    report = check_pass(fault(target="all"), program_for(fault), checks=QUICK, raises=False)
    assert check in report.failed, report
    assert says in report.failed[check]
    with pytest.raises(ConformanceError, match="planted: "):
        check_pass(fault(target="all"), program_for(fault), checks=QUICK)


def test_what_the_mistakes_are_made_from_is_right():
    report = check_pass(Scale(target="all"), program_for(Scale), checks=QUICK)
    assert "5 checks" in report.passed["zoo"]


@pytest.mark.parametrize("scale", [0.5, 5.0, 30.0])
def test_gradients_give_no_false_alarm_at_large_scales(scale):
    """Sharp and saturated nonlinearities: differences in fp32 are off by 10% there, those in fp64 by 1e-6."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 6)
    )
    program = program_for(Scale, net=net)
    pass_ = surgery.Lora(target="all,!norm", rank=2)
    report = check_pass(pass_, program, checks=["gradients"], scale=scale)
    assert "in fp64" in report.passed["gradients"] or scale > 1


@torch.library.custom_op("surgery_planted::linear", mutates_args=())
def linear_op(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    return x @ (packed.to(x.dtype) * scales.unsqueeze(1)).t() + bias


@linear_op.register_fake
def _(x, packed, scales, bias):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(8))
        self.register_buffer("scales", torch.rand(8) + 0.5)
        self.packed = nn.Parameter(torch.randint(-127, 127, (8, 6), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.surgery_planted.linear(x, self.packed, self.scales, self.bias)


def _unpacked(offset: int):
    return lambda t: (t["packed"].float() + offset) * t["scales"].unsqueeze(1)


@pytest.mark.parametrize("offset", [0, 2, -2])
def test_dequantize_is_what_the_op_computes(offset):
    class Plugin:
        @staticmethod
        @hookimpl
        def surgery_weight_ops():
            op = torch.ops.surgery_planted.linear.default
            return {op: WeightOp(LINEAR, "x", ("packed", "scales"), "bias", dequantize=_unpacked(offset))}

    torch.manual_seed(0)
    plugins = make_plugin_manager(plugins=(Plugin,))
    net = nn.Sequential(nn.Linear(6, 6), Packed())
    program = surgery.capture(net.eval(), torch.randn(4, 6), plugins=plugins)
    pass_ = surgery.Lora(target="0", rank=2)
    if not offset:
        report = check_pass(pass_, program, checks=["packed"])
        assert report.passed["packed"].startswith("1 of 1 within")
        return
    with pytest.raises(ConformanceError, match=r"packed at 1\.packed: the dequantize of .* is off by 1\.\d%"):
        check_pass(pass_, program, checks=["packed"])


def test_constant_parameters_get_noise_and_the_given_program_keeps_its_own():
    program = program_for(Scale)
    before = {name: tensor.clone() for name, tensor in program.state().items()}
    check_pass(Scale(target="all"), program, checks=["merge", "input"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state().items())
