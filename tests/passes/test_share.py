"""share and untie: one weight for several layers, with the sum of their gradients, stored once; and untied again."""

from __future__ import annotations

import onnx
import pytest
import torch
from safetensors import safe_open
from torch import nn

import surgery
from surgery.common.errors import PassError
from surgery.testing import check_pass
from tests.shared import models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(layers: int = 4) -> tuple[nn.Module, surgery.Program]:
    torch.manual_seed(0)
    net = Stack(layers)
    return net, surgery.capture(net, (torch.randn(5, 6),), dynamic={"x": {0: "batch"}})


def groups(program: surgery.Program) -> list[list[int]]:
    """Layers that read one up-projection, found from the operands in the graph."""
    found: dict[str, list[int]] = {}
    for record in program.journal.entries[-1].sites:
        if record.path.endswith(".up"):
            found.setdefault(record.decided["weight"], []).append(int(record.path.split(".")[1]))
    return sorted(found.values())


def tie(net: nn.Module, layers: list[int], biases: bool = True) -> None:
    leader = net.blocks[layers[0]]
    for index in layers[1:]:
        for name in ("up", "down"):
            getattr(net.blocks[index], name).weight = getattr(leader, name).weight
            if biases:
                getattr(net.blocks[index], name).bias = getattr(leader, name).bias


@pytest.mark.parametrize("biases", ["shared", "own"])
def test_outputs_and_gradients_are_those_of_tied_layers(biases):
    """Against a twin whose layers are tied by hand: same outputs, and for the shared weight the summed gradient."""
    _, base = stack()
    program = base.apply(surgery.Share(target="mlp.*", groups=2, biases=biases))
    twin, _ = stack()
    tie(twin, [0, 1], biases == "shared")
    tie(twin, [2, 3], biases == "shared")
    x = torch.randn(7, 6)
    assert torch.equal(program.run(x), twin(x))
    module = program.module().train()
    module(x).square().sum().backward()
    twin(x).square().sum().backward()
    got = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in twin.named_parameters()}
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        # a sum of two layers' gradients, in either order
        assert float((got[name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()), name
    assert program.count_parameters()[0] == sum(p.numel() for p in twin.parameters())


@pytest.mark.parametrize(
    ("layers", "options", "expected"),
    [
        (4, {}, [[0, 1, 2, 3]]),
        (4, {"groups": 2}, [[0, 1], [2, 3]]),
        (5, {"groups": 2}, [[0, 1, 2], [3, 4]]),
        (4, {"every": 2}, [[0, 2], [1, 3]]),
        (5, {"every": 2}, [[0, 2, 4], [1, 3]]),
    ],
)
def test_groups(layers, options, expected):
    _, base = stack(layers)
    for mode in ("first", "mean"):
        assert groups(base.apply(surgery.Share(target="mlp.*", mode=mode, **options))) == expected


@pytest.mark.parametrize("mode", ["first", "mean"])
def test_equal_layers_are_shared_exactly(mode):
    """Three equal layers: (w + w + w) / 3 may not be w, so the mean of equals is one of them."""
    net, _ = stack(3)
    for block in net.blocks[1:]:
        block.load_state_dict(net.blocks[0].state_dict())
    base = surgery.capture(net, (torch.randn(5, 6),))
    program = base.apply(surgery.Share(target="mlp.*,norm", mode=mode))
    assert torch.equal(program.run(), base.run())
    assert program.journal.entries[-1].numerics["observed"] == "bit for bit"


def test_the_mean_is_the_mean():
    net, base = stack()
    program = base.apply(surgery.Share(target="mlp.up", mode="mean", every=2))
    assert sorted(program.tensors) == [f"blocks.{i}.up.share.{n}" for i in (0, 1) for n in ("bias", "weight")]
    expected = (net.blocks[1].up.weight.double() + net.blocks[3].up.weight.double()) / 2
    assert torch.equal(program.tensors["blocks.1.up.share.weight"], expected.float())


@pytest.mark.parametrize("mode", ["first", "mean"])
def test_stored_once(tmp_path, mode):
    """One copy on disk beside the base, one in ONNX, and none of the layers' own in the latter."""
    _, base = stack()
    program = base.apply(surgery.Share(target="mlp.*", mode=mode))
    assert base.count_parameters()[0] - program.count_parameters()[0] == 3 * (8 * 16 * 2 + 16 + 8)
    module = program.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    program.save(tmp_path / "saved")
    stored: list[str] = []
    for name in ("inserted", "changed"):
        if (tmp_path / "saved" / f"{name}.safetensors").exists():
            with safe_open(tmp_path / "saved" / f"{name}.safetensors", "pt") as file:
                stored += file.keys()
    owner = "blocks.0.up.share.weight" if mode == "mean" else "blocks.0.up.weight"
    assert [name for name in stored if ".up." in name and name.endswith("weight")] == [owner]
    again = surgery.load(str(tmp_path / "saved"), base=base)
    assert torch.equal(again.run(), program.run())
    program.export(tmp_path / "m.onnx")
    held = [
        t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    ]
    sizes = [tuple(t.dims) for t in held]
    assert sizes.count((16, 8)) + sizes.count((8, 16)) == 2  # up and down, once each
    total = sum(torch.Size(s).numel() for s in sizes)
    assert total <= program.count_parameters()[0] + 8  # and a constant or two


@pytest.mark.parametrize("mode", ["first", "mean"])
def test_it_learns_then_goes_apart_and_back(mode):
    """Trained shared; untied, each layer keeps what was trained; undone, each has its own again, bit for bit."""
    net, base = stack()
    program = base.apply(surgery.Share(target="mlp.*", mode=mode), surgery.Freeze(target="first,head,norm"))
    module = program.module().train()
    names = {n for n, p in module.named_parameters() if p.requires_grad}
    assert len(names) == 4
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    optimiser = torch.optim.Adam(module.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert {n for n, t in module.state_dict().items() if not torch.equal(t, before[n])} == names
    trained = program.run(x)
    apart = program.apply(surgery.Untie(target="mlp.*"))
    assert torch.equal(apart.run(x), trained)
    own = [apart.tensors[f"blocks.{i}.up.untie.weight"] for i in range(4)]
    assert all(torch.equal(w, own[0]) for w in own)
    assert len({id(w) for w in own}) == 4
    assert apart.count_parameters()[0] == base.count_parameters()[0]
    dense = apart.undo("share").merge()
    assert torch.equal(dense.run(x), trained)
    assert torch.equal(dense.state()["blocks.3.up.weight"], own[0])
    back = program.undo("share")
    for i in range(1, 4):
        assert torch.equal(back.state()[f"blocks.{i}.up.weight"], net.blocks[i].up.weight)
    assert torch.equal(program.undo_all().run(x), base.run(x))
    if mode == "mean":
        assert torch.equal(back.run(x), base.run(x))


@pytest.mark.parametrize("order", ["share first", "lora first"])
def test_adapters_of_sharing_layers_stay(order, randomise):
    """Folding one would change what all layers read, or be lost with the weight that none reads."""
    _, base = stack()
    share, lora = surgery.Share(target="mlp.*"), surgery.Lora(target="mlp.up,head", rank=2)
    program = base.apply(*((share, lora) if order == "share first" else (lora, share)), freeze_base=True)
    randomise(program, 0.5)
    assert not torch.allclose(program.run(), base.apply(share).run(), atol=1e-3)
    with pytest.raises(PassError, match=r"lora: share has replaced blocks.0.up.weight"):
        program.merge()
    assert torch.equal(program.without("lora").run(), base.apply(share).run())
    assert program.without("share").merge().journal.entries[-1].options["folded"] == ["lora"]
    sparse = base.apply(share).apply(surgery.SparseTune(target="mlp.up", density=0.1))
    assert torch.equal(sparse.run(), base.apply(share).run())
    randomise(sparse, 0.5)
    assert torch.equal(sparse.undo("sparse-tune").run(), base.apply(share).run())


def test_untie_what_the_model_ties(randomise):
    module, inputs = models.forms()
    base = surgery.capture(module, inputs)
    program = base.apply(surgery.Untie(target="head"))
    assert torch.equal(program.run(), base.run())
    assert program.count_parameters()[0] == base.count_parameters()[0] + 11 * 8
    randomise(program)
    state = program.merge().state()
    assert torch.equal(state["embed.weight"], module.embed.weight)
    assert torch.equal(state["head.weight"], program.tensors["head.untie.weight"])
    assert torch.equal(program.merge().run(), program.run())
    assert torch.equal(program.undo("untie").run(), base.run())
    both = program.apply(surgery.Lora(target="head", rank=2))
    randomise(both)
    assert float((both.merge().run() - both.run()).abs().max()) <= 5e-6 * float(both.run().abs().max())
    under = base.apply(surgery.Lora(target="head", rank=2)).apply(surgery.Untie(target="head"))
    randomise(under)
    assert float((under.merge().run() - under.run()).abs().max()) <= 5e-6 * float(under.run().abs().max())


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (
            surgery.Share(target="head"),
            r"share at head: refused, it is in none of the model's repeated blocks",
        ),
        (surgery.Share(target="mlp.up", groups=4), r"blocks.0.up: refused, no other layer of its group"),
        (surgery.Share(target="mlp.up", every=9), r"no other layer of its group has a targeted weight"),
        (
            surgery.Untie(target="head"),
            r"untie at head: refused, nothing else reads its weight; there is nothing",
        ),
    ],
)
def test_refused(pass_, message):
    _, base = stack()
    with pytest.raises(PassError, match=message):
        base.apply(pass_)


def test_refused_over_what_stands_there():
    _, base = stack()
    factored = base.apply(surgery.LowRank(target="blocks.1.up", rank=2))
    (refused,) = factored.plan(surgery.Share(target="mlp.up")).passes[-1].refused
    assert refused.site.path == "blocks.1.up"
    assert refused.refusal == "'low-rank' has put another op in its place; undo that first"
    assert groups(factored.apply(surgery.Share(target="mlp.up"))) == [[0, 2, 3]]
    tuned = base.apply(surgery.SparseTune(target="blocks.1.up"))
    with pytest.raises(
        PassError, match=r"'sparse-tune' changes its weight; undo that, or apply it after this"
    ):
        tuned.apply(surgery.Share(target="mlp.up"))
    shared = base.apply(surgery.Share(target="mlp.up"))
    with pytest.raises(PassError, match=r"since 'share' its group reads one weight already"):
        shared.apply(surgery.Share(target="mlp.up", label="again"))
    with pytest.raises(
        PassError, match=r"low-rank at .*: refused, blocks.0.up.weight is read in another place too"
    ):
        shared.apply(surgery.LowRank(target="mlp.up", rank=2))
    wider = base.apply(surgery.Share(target="mlp.up", groups=2)).apply(
        surgery.Share(target="mlp.up", label="all")
    )
    assert wider.count_parameters()[0] == shared.count_parameters()[0]
    assert torch.equal(wider.run(), shared.run())
    with pytest.raises(PassError, match="give one of --groups and --every, not both"):
        surgery.Share.parse({"groups": "2", "every": "2", "target": "mlp.*"})
    with pytest.raises(PassError, match="needs a target"):
        base.apply(surgery.Share())


@pytest.mark.parametrize("mode", ["first", "mean"])
def test_kit(mode):
    _, base = stack()
    report = check_pass(surgery.Share(target="mlp.*,norm", mode=mode, groups=2), base)
    print(report)
    assert set(report.skipped) == {"tied", "second", "merge", "restored"}


def test_kit_of_untie_on_tied_and_on_shared():
    report = check_pass(surgery.Untie(target="head"), surgery.capture(*models.forms()))
    print(report)
    assert set(report.skipped) == {"second"}
    _, base = stack()
    report = check_pass(surgery.Untie(target="mlp.*"), base.apply(surgery.Share(target="mlp.*", mode="mean")))
    print(report)
    assert set(report.skipped) == {"tied", "second", "merge", "restored"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "smollm2", "t5", "vit", "resnet18", "wav2vec2", "mixtral"])
@pytest.mark.parametrize("mode", ["first", "mean"])
def test_kit_on_models(name, mode):
    from tests.techniques.models import program

    target = {"resnet18": "conv,norm"}.get(name, "attn.*,mlp.*")
    report = check_pass(surgery.Share(target=target, mode=mode), program(name))
    print(report)
    assert set(report.skipped) <= {"tied", "second", "merge", "restored"}
