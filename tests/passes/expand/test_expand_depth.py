"""expand --deeper: the copied blocks, that a copy is the identity, that it learns, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import JournalError, PassError


class Block(nn.Module):
    def __init__(self, width: int, post_norm: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)
        self.post_norm = post_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post_norm:
            return self.norm(x + self.down(torch.relu(self.up(x))))
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, post_norm: bool = False, layers: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block(8, post_norm) for _ in range(layers))
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.fixture(scope="module")
def net() -> surgery.Program:
    torch.manual_seed(0)
    return surgery.capture(Net(), (torch.randn(3, 6),))


@pytest.mark.parametrize(("options", "copied"), [
    ({"deeper": 2}, [1, 3]), ({"deeper": 4}, [0, 1, 2, 3]), ({"after": "0,2"}, [0, 2]),
    ({"deeper": 1, "target": "blocks.2"}, [2]),
])  # fmt: skip
def test_spread_over_the_row(net, options, copied):
    deeper = net.apply(surgery.Expand(**options))
    assert [r.decided["block"] for r in deeper.journal.entries[-1].sites] == [f"blocks.{n}" for n in copied]
    assert torch.equal(deeper.run(), net.run())
    assert deeper.journal.entries[-1].numerics["observed"] == "bit for bit"


def test_after_a_norm_the_copy_is_gated():
    torch.manual_seed(0)
    base = surgery.capture(Net(post_norm=True), (torch.randn(3, 6),))
    decided = base.apply(surgery.Expand(deeper=1)).journal.entries[-1].sites[0].decided
    assert decided["zero"] == []
    assert decided["gate"] == {"name": "residual_gate", "shape": [8]}


def test_later_passes_stand_on_a_copy(net):
    adapted = net.apply(surgery.Expand(deeper=1)).apply(surgery.Lora(target="expand_1.up", rank=2))
    with pytest.raises(JournalError, match="undo 'lora' first"):
        adapted.undo("expand")
    with torch.no_grad():
        adapted.tensors["blocks.3.expand_1.up.lora.B"].normal_()
        adapted.tensors["blocks.3.expand_1.down.weight"].normal_()
    torch.testing.assert_close(adapted.merge().run(), adapted.run())
    assert torch.equal(adapted.undo("lora").undo("expand").run(), net.run())
    assert torch.equal(adapted.without("expand").run(), net.run())


def test_refusals(net):
    with pytest.raises(PassError, match="--after 9: no such block; the blocks are 0, 1, 2, 3"):
        net.apply(surgery.Expand(after="9"))
    with pytest.raises(PassError, match="give one of --deeper"):
        surgery.Expand(deeper=1, wider="2")
    with pytest.raises(PassError, match=r"'lora'.*apply expand first"):
        net.apply(surgery.Lora(target="blocks.1.up", rank=2)).apply(surgery.Expand(after="1"))


def test_before_a_norm_the_copy_ends_in_zeros(net):
    deeper = net.apply(surgery.Expand(after="1"))
    decided = deeper.journal.entries[-1].sites[0].decided
    assert decided["gate"] is None
    assert sorted(decided["zero"]) == ["blocks.1.down.bias", "blocks.1.down.weight"]
    for name, tensor in deeper.tensors.items():
        original = name.replace(".expand.", ".").replace(".expand_1.", ".")
        if "down" in name:
            assert not tensor.any()
        else:
            assert torch.equal(tensor, net.base.tensors[original]), name
