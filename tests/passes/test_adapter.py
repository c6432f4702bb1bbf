"""Bottleneck adapters: positions, outputs, learning, and the whole kit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

import surgery
from surgery.common.errors import PassError, TargetError
from surgery.graph.marks import mark_of
from surgery.passes.adapter import Adapter
from surgery.testing import check_pass
from tests.conftest import minilm_path
from tests.shared.models import convnet
from tests.techniques.models import program

SITES = {"houlsby": 4, "pfeiffer": 2, "parallel": 2}  # of two layers


@pytest.fixture(scope="module")
def two_layers():
    return surgery.load(f"hf:{minilm_path()}", model_kwargs={"num_hidden_layers": 2})


@pytest.mark.parametrize("placement", SITES)
def test_placed_by_dataflow(two_layers, placement):
    adapted = two_layers.apply(Adapter(placement=placement, size=8))
    roles = {"houlsby": {"attn.out", "mlp.down"}}.get(placement, {"mlp.down"})
    entry = adapted.journal.entries[-1]
    assert len(entry.sites) == SITES[placement]
    assert {two_layers.sites.by_key[r.key].role for r in entry.sites} == roles
    assert entry.numerics["observed"] == "bit for bit"
    assert adapted.count_parameters()[1] == SITES[placement] * (2 * 8 * 384 + 8 + 384)


@pytest.mark.parametrize("placement", SITES)
def test_computes_what_hooks_on_the_eager_model_do(two_layers, placement, randomise):
    """Eager BERT with the adapter written as hooks on its dropouts, which close a branch in both."""
    adapted = randomise(two_layers.apply(Adapter(placement=placement, size=8, activation="gelu", scale=2.0)))
    model = AutoModel.from_pretrained(minilm_path(), num_hidden_layers=2).eval()
    read: dict[str, torch.Tensor] = {}

    def bottleneck(path: str, x: torch.Tensor) -> torch.Tensor:
        down, down_bias, up, up_bias = (
            adapted.tensors[f"{path}.adapter.{n}"] for n in ("down", "down_bias", "up", "up_bias")
        )
        return 2.0 * F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)

    def hook(path: str, entry: str):
        def act(module, args, output):
            return output + bottleneck(path, read[entry] if placement == "parallel" else output)

        return act

    for number, layer in enumerate(model.encoder.layer):
        prefix = f"encoder.layer.{number}"
        layer.intermediate.register_forward_pre_hook(
            lambda module, args, key=prefix: read.__setitem__(key, args[0])
        )
        layer.output.dropout.register_forward_hook(hook(f"{prefix}.output.dense", prefix))
        if placement == "houlsby":
            closing = layer.attention.output.dropout
            closing.register_forward_hook(hook(f"{prefix}.attention.output.dense", prefix))
    _, kwargs = adapted.example_inputs
    with torch.no_grad():
        expected = model(**kwargs).last_hidden_state
    got = adapted.run()["last_hidden_state"]
    # The same products in the same order, but for how biases are added.
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((two_layers.run()["last_hidden_state"] - expected).abs().max()) > 1e-2


def test_learns_and_moves_nothing_else(two_layers):
    program = two_layers.apply(Adapter(size=8))
    module = program.module().train()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    _, inputs = program.example_inputs
    goal = torch.randn(2, 384, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(program.parameter_groups(3e-3))
    losses = []
    for _ in range(20):
        loss = (module(**inputs)["last_hidden_state"].mean(1) - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == (".adapter." not in name), name


def test_dropout_only_in_train_mode(two_layers, randomise):
    program = randomise(two_layers.apply(Adapter(size=8, dropout=0.5)))
    module = program.module()
    _, inputs = program.example_inputs
    once, again = (module(**inputs)["last_hidden_state"] for _ in range(2))
    assert torch.equal(once, again)
    drops = [n for n in module.train().graph_module().graph.nodes if "dropout" in str(n.target)]
    own = [n for n in drops if mark_of(n).entry == "adapter"]
    assert len(own) == 4
    assert not torch.equal(module(**inputs)["last_hidden_state"], module(**inputs)["last_hidden_state"])


@pytest.mark.slow
def test_conformance():
    kept_whole(check_pass(Adapter(size=6), program("vit")))


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("model", ["vit", "wav2vec2"])
def test_conformance_of_the_others(model, placement):
    kept_whole(check_pass(Adapter(placement=placement, size=6), program(model)))


def kept_whole(report):
    assert report.ok
    assert set(report.skipped) <= {"tied", "merge", "restored"}


def test_convolutional_blocks():
    report = check_pass(
        Adapter(placement="pfeiffer", size=6),
        program("resnet18"),
        checks=["numerics", "untouched", "inserted", "effect"],
    )
    assert "16 nodes" not in report.passed["inserted"]
    with pytest.raises(
        PassError, match=r"adapter at layer2\.0\.conv2: refused, its branch changes the image size"
    ):
        program("resnet18").apply(Adapter(placement="parallel", target="layer2.0.conv2"))


def test_refusals():
    plain = surgery.capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(3, 8),))
    with pytest.raises(PassError, match="no residual branch for placement 'houlsby'; use lora"):
        plain.apply(Adapter())
    with pytest.raises(PassError, match="no residual branch"):
        surgery.capture(*convnet()).apply(Adapter(placement="parallel"))
    with pytest.raises(TargetError, match="matches no site"):
        program("vit").apply(Adapter(target="layer.9"))


def test_a_target_chooses_places():
    adapted = program("vit").apply(Adapter(size=4, target="layers.1"))
    assert {r.path.split(".")[2] for r in adapted.journal.entries[-1].sites} == {"1"}
    only_ff = program("vit").apply(Adapter(size=4, target="mlp.down"))
    assert len(only_ff.journal.entries[-1].sites) == 2


def test_channels_are_told_from_a_square_image():
    """Eight channels on eight by eight pixels: the convolution's axis is the channels'."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + self.last(torch.relu(self.first(x)))

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), Block(), nn.Flatten(), nn.Linear(512, 3))
    base = surgery.capture(net, torch.randn(2, 3, 8, 8))
    adapted = base.apply(surgery.Adapter(size=4))
    assert [r.decided["axis"] for r in adapted.journal.find("adapter")[0].sites] == [1, 1]


def test_names_mean_nothing():
    """Attention and feed-forward are found by their computation, whatever the modules are called."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.m0, self.m1 = nn.LayerNorm(8), nn.Linear(8, 24)
            self.m2, self.m3 = nn.Linear(8, 8), nn.LayerNorm(8)
            self.m4, self.m5 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.m1(self.m0(x)).chunk(3, -1))
            x = x + self.m2(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.m5(F.gelu(self.m4(self.m3(x))))

    base = surgery.capture(nn.Sequential(Layer(), Layer()), torch.randn(2, 5, 8))
    places = {
        placement: [
            r.path for r in base.apply(Adapter(size=4, placement=placement)).journal.entries[-1].sites
        ]
        for placement in SITES
    }
    assert places == {
        "houlsby": ["0.m2", "0.m5", "1.m2", "1.m5"],
        "pfeiffer": ["0.m5", "1.m5"],
        "parallel": ["0.m5", "1.m5"],
    }


def test_starts_near_the_identity():
    """Normal with deviation 0.01, as in Houlsby et al.; what goes up is zero."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return x + self.last(torch.relu(self.first(x)))

    base = surgery.capture(nn.Sequential(Block(), Block()), torch.randn(2, 3, 64))
    program = base.apply(Adapter(size=64))
    down = [t.detach() for name, t in program.tensors.items() if name.endswith(".down")]
    assert down
    assert all(0.9e-2 < float(t.std()) < 1.1e-2 for t in down)
