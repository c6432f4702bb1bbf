"""untie as the remedy that other passes name: following the message to the letter makes the refused pass work."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.api import PassError
from surgery.testing import check_pass

# Sums of a product run in another order, or a weight is rounded once more: fp32 over two layers.
CLOSE = 1e-5


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


class Twice(nn.Module):
    """One convolution before two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b1, self.b2 = conv(), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b2(self.c(self.b1(self.c(x)).relu()))


class Tied(Twice):
    """Two convolutions with one weight, or one bias."""

    def __init__(self, slot: str) -> None:
        super().__init__()
        self.d = conv()
        setattr(self.d, slot, getattr(self.c, slot))

    def forward(self, x: Tensor) -> Tensor:
        return self.b2(self.d(self.b1(self.c(x)).relu()))


class Read(Twice):
    """A convolution whose weight the model also uses as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b1(self.c(x)) + self.c.weight.mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Attention blocks; the same one twice (as in ALBERT), or two with one query weight."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        first, other = Attention(), Attention()
        other.q.weight = first.q.weight
        self.layers = nn.ModuleList([first] if one else [first, other])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layers[0], self.layers[-1]):
            x = x + layer(x)
        return x


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


IMAGE, SEQUENCE, VECTOR = (3, 3, 5, 5), (3, 4, 8), (3, 16)
CASES = {
    "a convolution called twice": (Twice, IMAGE, surgery.FoldBatchnorm()),
    "a tied weight": (lambda: Tied("weight"), IMAGE, surgery.FoldBatchnorm()),
    "a tied bias": (lambda: Tied("bias"), IMAGE, surgery.FoldBatchnorm()),
    "a weight used as a number": (Read, IMAGE, surgery.FoldBatchnorm()),
    "an attention called twice": (lambda: Layers(True), SEQUENCE, surgery.FuseQkv()),
    "tied queries": (lambda: Layers(False), SEQUENCE, surgery.FuseQkv()),
}


def captured(make, shape) -> surgery.Program:
    torch.manual_seed(0)
    module = make().eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.bias.data, norm.running_mean):
            nn.init.normal_(tensor)
    return surgery.capture(module, (torch.randn(shape),))


def remedy(text: str) -> surgery.Untie:
    """The pass that a refusal names, as the command line would parse it."""
    found = re.search(r"(\S+)\.(?:weight|bias) .*--pass untie( --calls)?(?: --target (\S+))? first", text)
    assert found, text
    return surgery.Untie(target=found[3] or found[1], calls=bool(found[2]))


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_works(name):
    make, shape, pass_ = CASES[name]
    base = captured(make, shape)
    with pytest.raises(PassError) as error:
        base.apply(pass_)
    done = base.apply(remedy(str(error.value))).apply(pass_)
    assert len(done.journal.entries[-1].sites) == len(base.plan(pass_).passes[-1].sites)
    x = torch.randn(5, *shape[1:])
    torch.testing.assert_close(done.run(x), base.run(x), atol=CLOSE, rtol=CLOSE)


def test_a_layer_is_untied_from_itself(tmp_path):
    """Each call gets its own copy, as a layer of its own; in the reloaded directory and the ONNX file too."""
    base = captured(Twice, IMAGE)
    with pytest.raises(PassError, match=r"only its own 2 calls read its weight; untie them .* with --calls"):
        base.apply(surgery.Untie(target="c"))
    untied = base.apply(surgery.Untie(target="c", calls=True))
    assert torch.equal(untied.run(), base.run())
    assert [s.path for s in untied.sites if s.kind == "conv"] == ["c", "c.untie.call2"]
    adapted = untied.apply(surgery.Lora(target="c.untie.call2", rank=2, alpha=4))
    with torch.no_grad():
        adapted.tensors["c.untie.call2.lora.B"].normal_()
        adapted.tensors["c.untie.call2.weight"].mul_(1.5)
    x = base.example_inputs[0][0]
    first, second = (base.base.loaded.module.get_submodule(n) for n in ("b1", "b2"))
    layer = base.base.loaded.module.c
    inner = first(layer(x)).relu()
    own = adapted.tensors
    delta = F.conv2d(F.conv2d(inner, own["c.untie.call2.lora.A"], padding=1), own["c.untie.call2.lora.B"])
    expected = second(
        F.conv2d(inner, own["c.untie.call2.weight"], own["c.untie.call2.bias"], padding=1) + 2 * delta
    )
    torch.testing.assert_close(adapted.run(), expected, atol=CLOSE, rtol=CLOSE)
    adapted.save(tmp_path / "saved")
    assert torch.equal(surgery.load(str(tmp_path / "saved"), base=base).run(), adapted.run())
    assert adapted.export(tmp_path / "m.onnx").parity.error <= CLOSE


def test_the_kit_on_calls():
    report = check_pass(surgery.Untie(target="c", calls=True), captured(Twice, IMAGE))
    assert "one weight for all calls" in report.skipped["merge"]


@pytest.mark.parametrize(
    ("make", "target", "why"),
    [
        (Linears, "a", "it is called once"),
        (Linears, "all", "it is called once"),
    ],
)
def test_calls_of_a_layer_that_is_called_once(make, target, why):
    with pytest.raises(PassError, match=why):
        captured(make, VECTOR).apply(surgery.Untie(target=target, calls=True))


def test_calls_under_an_adapter():
    adapted = captured(Twice, IMAGE).apply(surgery.Lora(target="c", rank=2))
    with pytest.raises(PassError, match="it carries 'lora', which all its calls share"):
        adapted.apply(surgery.Untie(target="c", calls=True))


def test_low_rank_says_which_place():
    base = captured(Linears, VECTOR)
    with pytest.raises(PassError, match="give the other place a copy with --pass untie"):
        base.apply(surgery.LowRank(target="a", rank=2))
    done = base.apply(surgery.Untie(target="b")).apply(surgery.LowRank(target="a", rank=2))
    assert done.count_parameters()[0] < base.count_parameters()[0] + 16 * 16
