"""expand --side: branches at zero parallel to ops keep positions and causality and learn; refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import PassError
from tests.shared.models import convnet
from tests.shared.overfitting import falling_loss
from tests.techniques.models import program


@pytest.mark.parametrize(("name", "causal"), [("vit", False), ("mixtral", True)])
def test_causal_as_the_attention(name, causal):
    adapted = program(name).apply(surgery.Expand(side="conv", size=4, target="attn.q"))
    assert {r.decided["causal"] for r in adapted.journal.entries[-1].sites} == {causal}


def test_refusals():
    net, inputs = convnet()
    base = surgery.capture(net, inputs)
    assert torch.equal(
        base.apply(surgery.Expand(side="conv", size=4, kernel=5, target="0")).run(), base.run()
    )
    with pytest.raises(PassError, match="give a --kernel of the same parity"):
        base.apply(surgery.Expand(side="conv", kernel=2, target="0"))
    with pytest.raises(PassError, match="--side needs a target"):
        base.apply(surgery.Expand(side="dense"))
    with pytest.raises(PassError, match="--kernel belongs to --side conv"):
        surgery.Expand(side="dense", kernel=3)
    linear = surgery.capture(nn.Linear(4, 4), (torch.randn(3, 4),))
    with pytest.raises(PassError, match="use --side dense"):
        linear.apply(surgery.Expand(side="conv", target="all"))


class Blocks(nn.Module):
    """Position-wise blocks: (batch, sequence, 6)."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(x + self.down(torch.relu(self.up(x))))


def test_a_causal_branch_sees_the_past_and_no_more():
    torch.manual_seed(0)
    base = surgery.capture(Blocks(), (torch.randn(2, 7, 6),))
    x = torch.randn(2, 7, 6)
    later, earlier = x.clone(), x.clone()
    later[:, 4] += 1
    earlier[:, 2] += 1
    for causal in ("yes", "no"):
        program = base.apply(surgery.Expand(side="conv", size=4, target="up", causal=causal))
        with torch.no_grad():
            for tensor in program.tensors.values():
                tensor.normal_()
        moved = (program.run(later) - program.run(x)).abs().amax((0, 2))
        assert (moved[:3] == 0).all()
        assert (moved[3] == 0) == (causal == "yes")  # a kernel of 3 reaches one position ahead where it may
        moved = (program.run(earlier) - program.run(x)).abs().amax((0, 2))
        assert moved[3] > 0
        assert (moved[4] > 0) == (causal == "yes")


class Decoder(nn.Module):
    """Two layers of causal (or full) attention and a feed-forward, pre-norm; logits of every position."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8),
                           "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
            for _ in range(2)
        )  # fmt: skip

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            parts = layer["qkv"](layer["norm"](x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            x = x + layer["out"](mixed.transpose(1, 2).flatten(2))
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.head(x)


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_decoder_stays_causal(causal, randomise):
    """Without --causal: the branch sees the same positions as the attention of its block."""
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 7))
    later = ids.clone()
    later[:, 4] = (later[:, 4] + 1) % 11
    base = surgery.capture(Decoder(causal), (ids,))
    program = randomise(base.apply(surgery.Expand(side="conv", size=4, target="all-linear,!head")), 0.5)
    assert not torch.allclose(program.run(ids), base.run(ids), atol=1e-2)
    moved = (program.run(later) - program.run(ids)).abs().amax((0, 2))
    assert (moved[4:] > 0).all()
    assert (moved[:4] == 0).all() if causal else (moved[:4] > 0).all()
    assert {r.decided["causal"] for r in program.journal.entries[-1].sites} == {causal}


@pytest.mark.parametrize("side", ["dense", "conv"])
def test_it_learns(side):
    torch.manual_seed(0)
    base = surgery.capture(Blocks(), (torch.randn(2, 7, 6),))
    program = base.apply(surgery.Expand(side=side, size=8, target="up,down"))
    losses = falling_loss(program, (torch.randn(2, 7, 6),), 4)
    assert losses[-1] < 0.8 * losses[0]
