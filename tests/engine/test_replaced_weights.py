"""The module of a program holds what its graphs read: no optimizer or state dict has weights that a pass replaced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import api
from surgery.engine.state import read_names


class Net(nn.Module):
    """Convolutions with batch norm, a hidden layer, and a head; one parameter is never read."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.norm, self.c2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)
        self.idle = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.c2(self.norm(self.c1(x)).relu()).mean((2, 3))
        return self.head(h + self.down(self.up(h).relu()))


PASSES = {
    "prune-filters": [surgery.PruneFilters(ratio=0.5)],
    "quantize": [surgery.Quantize(target="all", format="int8")],
    "low-rank": [surgery.LowRank(target="up,down", rank=2)],
    "fold-batchnorm": [surgery.FoldBatchnorm()],
    "head": [surgery.Head(labels=3)],
    "prune, then low rank": [surgery.PruneFilters(ratio=0.5), surgery.LowRank(target="up", rank=2)],
    "prune, then quantize": [surgery.PruneFilters(ratio=0.5), surgery.Quantize(target="all", format="int8")],
    "lora": [surgery.Lora(target="all", rank=2)],
    "sparse": [surgery.Sparse(target="all")],
}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return surgery.capture(Net().eval(), (torch.randn(2, 3, 6, 6),))


@pytest.mark.parametrize("name", PASSES)
def test_the_module_holds_what_is_read(base, name):
    program = base.apply(*PASSES[name])
    module = program.module()
    before = program.run()
    held = dict(module.named_parameters())
    count, _ = program.count_parameters()
    assert sum(p.numel() for p in held.values()) == count
    assert "idle" in held  # the model itself never reads it
    stored = module.state_dict()
    read = read_names(program.graph)
    assert set(stored) - read <= {"idle", "norm.num_batches_tracked"}
    module.load_state_dict(stored)
    assert torch.equal(module(*program.example_inputs[0]), before)
    assert torch.equal(program.run(), before)
    # The base is as it was, also after steps of an optimizer over everything the module has.
    module.train()
    module(*program.example_inputs[0]).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert torch.equal(program.undo_all().run(), base.run())


def test_a_small_unet_counts_what_is_left():
    """The module of a pruned U-Net lists what is left, without the weights that were replaced."""

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
            self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x).relu()
            return self.out(torch.cat([a, self.up(self.b(a).relu()).relu()], 1))

    torch.manual_seed(0)
    base = surgery.capture(UNet().eval(), (torch.randn(2, 1, 8, 8),))
    pruned = base.apply(surgery.PruneFilters(ratio=0.5))
    module = pruned.module()
    left = sum(p.numel() for p in module.parameters())
    assert left == pruned.count_parameters()[0] < base.count_parameters()[0] / 2
    assert sum(t.numel() for t in module.state_dict().values()) == left


def test_a_tied_weight_stays_under_all_its_names():
    """A quantized table goes, but not while the head still reads the same tensor."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    base = surgery.capture(Tied().eval(), (torch.randint(0, 11, (2, 5)),))
    one = base.apply(surgery.Quantize(target="table", format="int8")).module()
    both = base.apply(surgery.Quantize(target="all", format="int8")).module()
    weights = {n for n, _ in one.named_parameters(remove_duplicate=False)}
    assert weights == {"table.weight", "head.weight"}
    assert not [n for n, _ in both.named_parameters()]


def test_a_weight_that_only_the_train_graph_reads_is_added():
    """A pass whose train graph still reads the weight that its eval graph has replaced."""

    class Frozen(api.RewritePass):
        """Test: a constant output in eval mode."""

        name = "test-frozen"
        effect = api.SWAP
        numerics = api.changes("test")

        def rewrite(self, site, g):
            if g.training:
                return None
            return g.call(torch.ops.aten.zeros_like.default, g.output)

    class Plugin:
        @staticmethod
        @api.hookimpl
        def surgery_passes():
            return [Frozen]

    plugins = api.programs.make_plugin_manager(plugins=(Plugin,))
    base = surgery.capture(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(2, 3),), plugins=plugins
    )
    module = base.apply(Frozen(target="1"), freeze_base=False).module()
    x = torch.randn(2, 3)
    assert not module(x).any()
    module.train()
    torch.testing.assert_close(module(x), base.run(x))
