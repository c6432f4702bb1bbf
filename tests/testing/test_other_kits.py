"""The kits of objectives, loaders and ops find planted mistakes, and pass what is right."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import surgery
from surgery.api import LINEAR, WeightOp, hookimpl
from surgery.api.programs import LoadedModel, make_plugin_manager
from surgery.api.training import Classification
from surgery.testing import ConformanceError, check_loader, check_objective, check_weight_op, text_classifier
from surgery.train.objectives import Contrastive

WORDS = ("a", "good", "bad", "very", "film")
ROWS = [
    {"text": text, "label": label}
    for text, label in (("a good film", "yes"), ("a very very bad film", "no")) * 4
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    ref = text_classifier(tmp_path_factory.mktemp("bert"), WORDS)
    return surgery.load(ref, task="text-classification")


def test_a_right_objective_passes_and_the_program_is_unchanged(program):
    before = {name: t.clone() for name, t in program.state().items()}
    report = check_objective(Classification(smoothing=0.1), program, ROWS)
    assert report.ok
    assert not report.skipped
    assert all(torch.equal(t, before[name]) for name, t in program.state().items())


class Detached(Classification):
    """A loss of which a part is detached."""

    name: ClassVar[str] = "detached"

    def loss(self, module, batch):
        loss = super().loss(module, batch)
        return loss + (2 * loss.detach() - 1) * loss


class Summed(Classification):
    """A sum where `terms` counts rows."""

    name: ClassVar[str] = "summed"

    def loss(self, module, batch):
        return super().loss(module, batch) * len(batch["labels"])


class Drawn(Classification):
    """A loss that draws from the global generator."""

    name: ClassVar[str] = "drawn"

    def loss(self, module, batch):
        return super().loss(module, batch) * (1 + torch.rand(()))


class Nameless(Classification):
    """Metrics without the one that selects the best checkpoint."""

    name: ClassVar[str] = "nameless"

    def metrics(self, observed):
        return {"loss": super().metrics(observed)["loss"]}


class Upward(Classification):
    """A loss whose minimum is the wrong label."""

    name: ClassVar[str] = "upward"

    def loss(self, module, batch):
        return torch.zeros(()) * super().loss(module, batch)


@pytest.mark.parametrize(
    ("wrong", "check"),
    [(Detached, "gradient"), (Summed, "rows"), (Drawn, "loss"), (Nameless, "metrics"), (Upward, "gradient")],
)
def test_a_wrong_objective_is_found(program, wrong, check):
    with pytest.raises(ConformanceError) as found:
        check_objective(wrong(), program, ROWS)
    assert found.value.check == check
    report = check_objective(wrong(), program, ROWS, raises=False)
    assert check in report.failed


def test_rows_that_are_compared(program, tmp_path):
    ref = text_classifier(tmp_path / "bert", WORDS)
    encoder = surgery.load(ref, task="feature-extraction")
    pairs = [
        {"anchor": "a good film", "positive": "good film"},
        {"anchor": "bad", "positive": "very bad"},
    ] * 4
    report = check_objective(Contrastive(), encoder, pairs, rows_apart=False)
    assert report.ok
    assert "rows" in report.skipped


# -- loaders


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x)


class Loader:
    """Loads "net:anything" without files; its weights are declared as drawn."""

    declared: ClassVar[bool] = True
    strict: ClassVar[bool] = True

    @hookimpl
    def surgery_load_schemes(self):
        return ["net"]

    @hookimpl
    def surgery_load_model(self, ref):
        if not ref.startswith("net:"):
            return None
        if self.strict and ref != "net:one":
            raise surgery.api.programs.LoadError(f"there is no {ref}; there is net:one")
        net = Net().eval()
        drawn = frozenset(dict(net.named_parameters())) if self.declared else frozenset()
        return LoadedModel(net, (torch.randn(2, 4),), dynamic_shapes=({0: Dim("batch")},), unsourced=drawn)


class Undeclared(Loader):
    declared = False


class Careless(Loader):
    strict = False


def test_a_right_loader_passes():
    assert check_loader("net:one", plugins=make_plugin_manager(plugins=(Loader(),))).ok


@pytest.mark.parametrize(("wrong", "check"), [(Undeclared, "again"), (Careless, "unknown")])
def test_a_wrong_loader_is_found(wrong, check):
    with pytest.raises(ConformanceError) as found:
        check_loader("net:one", plugins=make_plugin_manager(plugins=(wrong(),)))
    assert found.value.check == check


def test_a_built_in_scheme_is_refused():
    with pytest.raises(ConformanceError, match="scheme of surgery itself"):
        check_loader("timm:test_vit")


# -- ops with weights


@torch.library.custom_op("surgery_kits::linear", mutates_args=())
def linear(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return F.linear(x, codes.to(x.dtype) / 64)


@linear.register_fake
def _(x, codes):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


linear.register_autograd(
    lambda ctx, grad: (grad @ (ctx.saved_tensors[0].to(grad.dtype) / 64), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)
OP = torch.ops.surgery_kits.linear.default


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        codes = torch.randint(-127, 127, (6, 4), generator=torch.Generator().manual_seed(0))
        self.codes = nn.Parameter(codes.to(torch.int8), requires_grad=False)

    def forward(self, x):
        return torch.ops.surgery_kits.linear(x, self.codes)


def declare(factor: float, argument: str = "codes"):
    class Plugin:
        @hookimpl
        def surgery_weight_ops(self):
            unpack = lambda t: t[argument].float() * factor  # noqa: E731
            return {OP: WeightOp(LINEAR, "x", (argument,), None, dequantize=unpack)}

    module = nn.Sequential(Packed(), nn.GELU(), nn.Linear(6, 2)).eval()
    plugins = make_plugin_manager(plugins=(Plugin(),))
    return surgery.capture(module, (torch.randn(3, 4),), dynamic={"input": {0: "batch"}}, plugins=plugins)


@pytest.mark.slow
def test_a_right_op_passes():
    assert check_weight_op(OP, declare(1 / 64)).ok


def test_a_wrong_dequantize_is_found():
    with pytest.raises(ConformanceError) as found:
        check_weight_op(OP, declare(1 / 32))
    assert found.value.check == "packed"


def test_an_op_that_is_not_declared_is_found():
    plain = surgery.capture(nn.Sequential(nn.Linear(4, 2)).eval(), (torch.randn(3, 4),))
    with pytest.raises(ConformanceError, match="no plugin of the program declares it"):
        check_weight_op(OP, plain)
