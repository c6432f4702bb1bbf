"""Depth, width and side branches: exactness, positions of copies, and learning."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.common.errors import PassError
from surgery.testing import CHECKS, check_pass
from tests.conftest import minilm_path
from tests.techniques.catalogue import of
from tests.techniques.models import program

CHEAP = [
    name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx", "gradients", "held")
]
MODES = {
    "deeper": {"deeper": 1},
    "wider": {"wider": "1.5", "target": "mlp.up"},
    "dense side": {"side": "dense", "size": 4, "target": "attn.q,mlp.down"},
    "convolution at the side": {"side": "conv", "size": 4, "target": "attn.q,mlp.down"},
}
# Widths: every product is summed in another order, over two layers.
WIDER = 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_conformance(mode):
    assert check_pass(of("expand", **MODES[mode]), program("vit"), checks=CHEAP).ok


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["vit", "t5", "wav2vec2", "minilm", "smollm2", "resnet18"])
def test_whole_kit(model, mode):
    options = dict(MODES[mode])
    if model == "resnet18" and "target" in options:
        options["target"] = "layer2.1.conv1"
    assert check_pass(of("expand", **options), program(model)).ok


@pytest.mark.parametrize("model", ["vit", "t5", "wav2vec2"])
def test_deeper_is_exact_and_larger(model):
    base = program(model)
    deeper = base.apply(of("expand", deeper=1))
    before, after = base.run(), deeper.run()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert deeper.count_parameters()[0] > base.count_parameters()[0]
    assert len(deeper.sites) > len(base.sites)
    assert not any(deeper.trains(name) for name in base.parameter_names())


def test_a_post_norm_model_gets_a_gate():
    """BERT normalizes after its residual adds, so zeroed projections are not an identity there; a closed gate is."""
    base = surgery.load(f"hf:{minilm_path()}", model_kwargs={"num_hidden_layers": 2})
    deeper = base.apply(of("expand", deeper=2))
    assert torch.equal(base.run()["last_hidden_state"], deeper.run()["last_hidden_state"])
    assert sum(site.role == "attn.q" for site in deeper.sites) == 4


def test_wider_keeps_the_function():
    base = program("vit")
    wider = base.apply(of("expand", wider="2.0", target="mlp.up"))
    before, after = base.run()["logits"], wider.run()["logits"]
    assert float((before - after).abs().max()) <= WIDER * float(before.abs().max())
    assert wider.count_parameters()[0] > base.count_parameters()[0]


def test_only_the_copies_learn():
    deeper = program("vit").apply(of("expand", deeper=1))
    module = deeper.module().train()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    _, inputs = deeper.example_inputs
    goal = torch.arange(inputs["pixel_values"].shape[0]) % 2
    optimizer = torch.optim.Adam(deeper.parameter_groups(1e-2))
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(module(**inputs)["logits"], goal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert moved <= set(deeper.tensors)


def test_refusals():
    with pytest.raises(PassError, match=r"--deeper|--wider|--side"):
        program("vit").apply(of("expand"))
    with pytest.raises(PassError):
        surgery.capture(torch.nn.Linear(4, 4), torch.randn(2, 4)).apply(of("expand", deeper=1))
