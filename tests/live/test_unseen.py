"""Uses of a weight outside the call of its layer: refused by name, or supported."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from surgery.common.errors import PassError
from surgery.live import unseen


class Branching(nn.Module):
    """Cannot be captured; reads the weight of its embedding itself, and has a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, ids):
        hidden = self.linear(self.embed(ids))
        if hidden.sum() > 1e9:
            hidden = hidden * 2
        return functional.linear(hidden, self.embed.weight)


def stir(program):
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.3)


@pytest.fixture
def branching():
    torch.manual_seed(0)
    return Branching().eval(), torch.randint(0, 20, (3, 5))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("embed", "another module reads its weight without calling it"),
        ("unused", "the model never calls this layer"),
    ],
)
def test_refused_where_the_model_cannot_be_captured(branching, target, says):
    model, ids = branching
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PassError, match=says):
        surgery.apply_(model, surgery.Lora(target=f"path:{target}", rank=2), inputs=(ids,))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_layer_that_is_called_merges(branching):
    model, ids = branching
    stir(surgery.apply_(model, surgery.Lora(target="path:linear", rank=2), inputs=(ids,)))
    adapted = model(ids).detach()
    surgery.merge_(model)
    torch.testing.assert_close(model(ids), adapted)  # torch's own tolerance for float32


def test_a_merge_that_moves_the_live_model_is_taken_back(branching, monkeypatch):
    """The merge checks the live model itself: without the check of `apply_`, the merge refuses."""
    model, ids = branching
    monkeypatch.setattr("surgery.live.state.raw_reads", lambda example: {})
    stir(surgery.apply_(model, surgery.Lora(target="path:embed", rank=2), inputs=(ids,)))
    adapted = model(ids).detach()
    with pytest.raises(
        PassError, match=r"merge_: the live model's outputs moved .* weight of embed is also read"
    ):
        surgery.merge_(model)
    assert torch.equal(model(ids), adapted)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 16)


def test_torchs_fast_path_does_not_leave_adapters_out(encoder):
    model, x = encoder
    with torch.no_grad():
        base = model(x)
    stir(surgery.apply_(model, surgery.Lora(target="linear1,linear2", rank=2), inputs=(x,)))
    with torch.no_grad():
        adapted = model(x)
    assert float((adapted - base).abs().max()) > 0.1
    torch.testing.assert_close(model(x).detach(), adapted)
    surgery.remove_(model)
    with torch.no_grad():
        assert torch.equal(model(x), base)
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_a_layer_whose_weight_alone_is_read(encoder):
    model, x = encoder
    with pytest.raises(PassError, match="out_proj: the model uses its weight without calling it"):
        surgery.apply_(model, surgery.Lora(target="out_proj", rank=2), inputs=(x,))


def test_raw_reads_leave_the_model_as_it_was(branching):
    from surgery.capture import LoadedModel

    model, ids = branching
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = unseen.raw_reads(LoadedModel(model, args=(ids,)))
    assert set(found) == {"embed", "unused"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
