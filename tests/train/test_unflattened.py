"""A graph split into its original modules: the same outputs and gradients bit for bit, one call per block."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel, T5ForConditionalGeneration

import surgery
from surgery.train.unflattened import Unflattened
from tests.shared import tiny
from tests.train.conftest import bert_config


def loaded(model, folder, **options):
    torch.manual_seed(0)
    model.save_pretrained(folder)
    return surgery.load(f"hf:{folder}", **options)


def random(program):
    generator = torch.Generator().manual_seed(1)
    for tensor in program.tensors.values():
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return program


def gradients(module, program):
    module.zero_grad()
    args, kwargs = program.example_inputs
    torch.manual_seed(3)  # dropout
    outputs = module(*args, **kwargs)
    leaves = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    sum(t.float().square().sum() for t in leaves if t.requires_grad).backward()
    return leaves, {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["bert", "bert in codes", "t5", "timm"])
def test_the_same_to_the_bit(kind, tmp_path):
    if kind == "timm":
        program = surgery.load("timm:resnet18", random=True).apply(surgery.Full())
        units = {f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)}
    elif kind == "t5":
        program = loaded(T5ForConditionalGeneration(tiny.t5()), tmp_path).apply(
            surgery.Lora(target="attn.*", rank=2)
        )
        units = {f"{part}.block.{i}" for part in ("encoder", "decoder") for i in (0, 1)}
    else:
        program = loaded(BertModel(bert_config()), tmp_path)
        if kind == "bert in codes":
            program = program.apply(surgery.Quantize(target="mlp.*", format="int4"))
        program = program.apply(surgery.Lora(target="attn.*", rank=2))
        units = {"encoder.layer.0", "encoder.layer.1"}
    plain = random(program).module()
    made = Unflattened(plain)
    assert set(made.units) == units
    assert dict(made.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    called = []
    for path in made.units:
        made.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
    for mode in (False, True):
        plain.train(mode)
        made.train(mode)
        wanted, grads = gradients(plain, program)
        called.clear()
        found, own = gradients(made, program)
        assert sorted(called) == sorted(units)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        assert grads.keys() == own.keys()
        assert all(torch.equal(grads[name], own[name]) for name in grads)


def test_what_is_read_elsewhere_stays_in_the_whole():
    class Shares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x @ self.layers[1].weight

    torch.manual_seed(0)
    program = surgery.capture(Shares(), (torch.randn(2, 4),)).apply(surgery.Full())
    made = Unflattened(program.module())
    assert set(made.units) == {"layers.0", "layers.2"}
    x = torch.randn(2, 4)
    assert torch.equal(made(x), program.module()(x))
