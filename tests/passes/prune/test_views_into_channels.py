"""prune-filters where a view splits features into channels and positions: a channel goes with all its positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from tests.passes.prune.test_prune_filters import SAME, difference, masked

CHANNELS, SIDE = 8, 4


class Seeded(nn.Module):
    """A linear layer (or a table) whose features become channels × positions, and what reads these."""

    def __init__(
        self, read: Callable[[nn.Module, Tensor], Tensor], *layers: nn.Module, positions: int = SIDE * SIDE
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CHANNELS * positions)
        self.layers = nn.ModuleList(layers)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, self.fc(x))


class Decoder(nn.Module):
    """An autoencoder: channels are flattened into a linear layer, and another one makes channels again."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.f1 = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 16)
        self.f2, self.n1, self.n2 = nn.Linear(16, 8 * 16), nn.BatchNorm1d(8 * 16), nn.BatchNorm2d(8)
        self.d1 = nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.d2 = nn.ConvTranspose2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.f1(self.c1(x).relu().flatten(1)).relu()
        image = self.n2(self.n1(self.f2(hidden)).view(-1, 8, 4, 4)).relu()
        return self.d2(self.d1(image).relu())


def image(y: Tensor) -> Tensor:
    return y.view(-1, CHANNELS, SIDE, SIDE)


def conv(groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, 8, 3, padding=1, groups=groups)


def first(m: nn.Module, y: Tensor) -> Tensor:
    return m.layers[0](image(y).relu())


def both(m: nn.Module, y: Tensor) -> Tensor:
    return m.layers[1](m.layers[0](image(y)).relu())


FORMS = {
    "view → Conv2d": Seeded(first, conv()),
    "view → ConvTranspose2d": Seeded(first, nn.ConvTranspose2d(CHANNELS, 5, 3)),
    "unflatten": Seeded(lambda m, y: m.layers[0](y.unflatten(1, (CHANNELS, SIDE, SIDE))), conv()),
    "channels last": Seeded(
        lambda m, y: m.layers[0](y.view(-1, SIDE, SIDE, CHANNELS).permute(0, 3, 1, 2)), conv()
    ),
    "Conv1d": Seeded(lambda m, y: m.layers[0](y.view(-1, CHANNELS, 16)), nn.Conv1d(CHANNELS, 5, 3)),
    "Conv3d": Seeded(lambda m, y: m.layers[0](y.view(-1, CHANNELS, 4, 2, 2)), nn.Conv3d(CHANNELS, 5, 2)),
    "depthwise": Seeded(both, conv(CHANNELS), nn.Conv2d(8, 3, 1)),
    "two groups": Seeded(both, conv(2), nn.Conv2d(8, 3, 1)),
    "batch norm": Seeded(both, nn.BatchNorm2d(CHANNELS), conv()),
    "instance norm": Seeded(both, nn.InstanceNorm2d(CHANNELS, affine=True), conv()),
    "group norm": Seeded(both, nn.GroupNorm(4, CHANNELS), conv()),
    "pooled": Seeded(
        lambda m, y: m.layers[0](F.adaptive_avg_pool2d(image(y), 1).flatten(1)), nn.Linear(CHANNELS, 3)
    ),
    "resized": Seeded(lambda m, y: m.layers[0](F.interpolate(image(y), scale_factor=2)), conv()),
    "padded": Seeded(lambda m, y: m.layers[0](F.pad(image(y), (1, 1, 2, 2))), conv()),
    "reflected": Seeded(both, nn.ReflectionPad2d(1), conv()),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_channel_goes_with_its_positions(name):
    """Whatever the plan accepts is applied, and computes what zeros would: fp32 sums in another order."""
    torch.manual_seed(0)
    module = FORMS[name].eval()
    for norm in (m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))):
        nn.init.normal_(norm.bias)
    base = surgery.capture(module, (torch.randn(3, 6),))
    pruned = base.apply(surgery.PruneFilters(ratio=0.5))
    groups = [group for r in pruned.journal.entries[-1].sites for group in r.decided["groups"]]
    assert groups
    assert pruned.count_parameters()[0] < 0.7 * base.count_parameters()[0]
    assert difference(masked(base, pruned), pruned.run()) <= SAME
    pruned.module().train()(torch.randn(5, 6)).sum().backward()


def test_an_autoencoder_shrinks_on_both_sides(tmp_path):
    """In the program, the reloaded directory, and the file that onnxruntime runs."""
    torch.manual_seed(0)
    base = surgery.capture(Decoder().eval(), (torch.randn(2, 3, 4, 4),))
    pruned = base.apply(surgery.PruneFilters(ratio=0.5))
    assert [r.path for r in pruned.journal.entries[-1].sites] == ["c1", "f1", "f2", "d1"]
    assert difference(masked(base, pruned), pruned.run()) <= SAME
    pruned.save(tmp_path / "pruned")
    again = surgery.load(str(tmp_path / "pruned"), base=base)
    assert torch.equal(again.run(), pruned.run())
    assert pruned.export(tmp_path / "pruned.onnx").parity.error <= 1e-5  # fp32, other kernels
