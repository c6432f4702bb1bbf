"""expand --wider: hidden layers keep their outputs, copies of units can diverge, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import PassError
from tests.shared.overfitting import falling_loss


def mlp(between: nn.Module | None = None) -> surgery.Program:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), between or nn.GELU(), nn.Linear(8, 5)]
    return surgery.capture(nn.Sequential(*layers), (torch.randn(4, 6),))


def test_the_algebra():
    base = mlp()
    wide = base.apply(surgery.Expand(wider="+4", target="0", noise=0.5))
    known = wide.journal.entries[-1].sites[0].decided
    index = torch.tensor([*range(8), *known["sources"]])
    old, new = base.state(), wide.tensors
    assert torch.equal(new["0.expand.weight"], old["0.weight"][index])
    assert torch.equal(new["0.expand.bias"], old["0.bias"][index])
    summed = torch.zeros_like(old["2.weight"]).index_add_(1, index, new["2.expand.weight"].detach())
    torch.testing.assert_close(summed, old["2.weight"].detach())
    torch.testing.assert_close(wide.run(), base.run())


def test_later_passes_see_the_new_sizes():
    wide = mlp().apply(surgery.Expand(wider="1.5", target="0"))
    sizes = {site.path: (site.in_features, site.out_features) for site in wide.sites}
    assert sizes == {"0.expand": (6, 12), "2.expand": (12, 5)}


def test_refusals():
    with pytest.raises(PassError, match="layer_norm lies between"):
        mlp(nn.LayerNorm(8)).apply(surgery.Expand(wider="1.5", target="0"))
    with pytest.raises(PassError, match=r"--wider '0\.5' adds no units"):
        surgery.Expand(wider="0.5")
    with pytest.raises(PassError, match=r"'lora'.*apply expand first"):
        mlp().apply(surgery.Lora(target="0", rank=2)).apply(surgery.Expand(wider="1.5", target="0"))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_copies_of_a_unit_part_by_noise_alone(noise):
    wide = mlp().apply(surgery.Expand(wider="+8", target="0", noise=noise))
    sources = wide.journal.entries[-1].sites[0].decided["sources"]
    outgoing = wide.tensors["2.expand.weight"].detach()
    alike = [
        torch.equal(outgoing[:, 8 + number], outgoing[:, source]) for number, source in enumerate(sources)
    ]
    assert all(alike) if noise == 0 else not any(alike)


def test_it_learns():
    base = mlp()
    wide = base.apply(surgery.Expand(wider="1.5", target="0"))
    losses = falling_loss(wide, (torch.randn(64, 6),), 5)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(base.run(), wide.undo("expand").run())
