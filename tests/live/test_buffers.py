"""Running statistics that move in training belong to the passes: with all passes off, the base's own are in force."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

import surgery

# A merge rounds each weight once: a few units in the last place (6e-8) of the largest output.
ROUNDING = 5e-6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.norms = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.again = self.norms  # one module under two names: its statistics stay one tensor
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.again(self.body(hidden)))


def train(model, x):
    """A few steps in train mode, whose inputs move the statistics."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(4):
        output = model(x * 3 + 1)
        getattr(output, "logits", output).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def plain():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def moved():
    """A trained live model, its inputs, its outputs and those of the base."""
    model, x = plain(), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = model(x).detach()
    program = surgery.apply_(model, surgery.Lora(target="conv,body", rank=2), inputs=(x,))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.3)
    train(model, x)
    still = model.norm.running_mean.clone()
    assert float((still - plain().norm.running_mean).abs().max()) > 0.1
    return model, x, model(x).detach(), before


def test_the_program_has_them(moved, tmp_path):
    model, x, trained, before = moved
    assert model.again.running_mean is model.norms.running_mean
    program = surgery.program_of(model)
    assert torch.equal(program.run(x), trained)
    assert float((program.merge().run(x) - trained).abs().max()) <= ROUNDING * float(trained.abs().max())
    surgery.save_(model, tmp_path / "saved")
    other = plain()
    surgery.load_(other, tmp_path / "saved", inputs=(x,))
    assert torch.equal(other(x), trained)
    surgery.remove_(other)
    assert torch.equal(other(x), before)


def test_without_passes_the_base_has_its_own(moved):
    model, x, trained, before = moved
    with surgery.using(model):
        assert torch.equal(model(x), before)
        model.train()(x * 5)  # moves neither those of the passes nor those of the base
        model.eval()
    assert torch.equal(model(x), trained)
    with surgery.using(model, "lora"):
        assert torch.equal(model(x), trained)
    surgery.weight_(model, {"lora": 0})
    assert torch.equal(model(x), before)
    assert torch.equal(surgery.program_of(model).run(x), before)
    surgery.weight_(model, {"lora": 1})
    surgery.merge_(model)
    assert float((model(x) - trained).abs().max()) <= ROUNDING * float(trained.abs().max())
    surgery.remove_(model, "merge")
    assert torch.equal(model(x), trained)
    for names in ((), ("lora",)):
        other = copy.deepcopy(model)
        surgery.remove_(other, *names)
        assert torch.equal(other(x), before)
        assert other.state_dict().keys() == plain().state_dict().keys()
        assert all(torch.equal(t, plain().state_dict()[n]) for n, t in other.state_dict().items())


def test_a_program_keeps_the_rule():
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    base = surgery.capture(plain(), x)
    before = base.run(x)
    program = base.apply(surgery.Lora(target="conv,body", rank=2))
    train(program.module(), x)
    trained = program.run(x)
    assert float((trained - before).abs().max()) > 0.01
    without = program.without("lora")
    assert torch.equal(without.run(x), before)
    without.module().train()(x * 5)
    for bare in (program.without("lora"), program.undo("lora"), program.undo_all(), base):
        assert torch.equal(bare.run(x), before)
    assert torch.equal(program.run(x), trained)


def test_a_transformers_model(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "base")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    images = torch.randn(4, 3, 32, 32)
    surgery.apply_(model, surgery.Lora(target="convolution", rank=2), example={"height": 32, "width": 32})
    train(model, images)
    trained = model(images).logits.detach()
    surgery.save_(model, tmp_path / "saved")
    graph = surgery.load(str(tmp_path / "saved")).run(images)["logits"]
    scale = float(trained.abs().max())
    assert float((graph - trained).abs().max()) <= ROUNDING * scale
    surgery.save_(model, tmp_path / "merged", format="hf")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    # Statistics divide: what a merge rounds grows through the layers.
    assert float((merged(images).logits - trained).abs().max()) <= 2e-4 * scale
