"""Prefix tuning: attention over learned and own keys, against a formula, in every form of attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from surgery.capture import fresh_inputs, other_sizes, trace
from surgery.common.errors import JournalError, PassError, SurgeryError
from surgery.common.plugins import make_plugin_manager
from surgery.engine.base import Base
from surgery.engine.program import Program
from surgery.testing import check_pass
from tests.techniques import models
from tests.zoo import zoo

# Sums over the keys in another order, in fp32, of at most a few dozen products: units in the last place.
ROUNDING = 5e-6
WIDTH, HEADS = 8, 2


def close(a, b, tolerance=ROUNDING):
    return float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


def by_hand(q, k, v, keys, values, mask=None, scale=None):
    """softmax(q [P_k; k]ᵀ · scale + [0; mask]) [P_v; v] for q (B, H, Q, D), k and v (B, h, S, D), P (h, P, D)."""
    batch, times = len(q), q.shape[1] // k.shape[1]
    k = torch.cat([keys.expand(batch, -1, -1, -1), k], 2).repeat_interleave(times, 1)
    v = torch.cat([values.expand(batch, -1, -1, -1), v], 2).repeat_interleave(times, 1)
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        scores = scores + functional.pad(
            mask.expand(batch, 1, q.shape[2], k.shape[2] - keys.shape[1]), (keys.shape[1], 0)
        )
    return scores.softmax(-1) @ v


def repeat_kv(x, times):
    batch, heads, length, width = x.shape
    return (
        x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)
    )


def sdpa(q, k, v, mask, **options):
    return functional.scaled_dot_product_attention(q, k, v, mask, **options)


def eager(q, k, v, mask):
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            if mask.dtype == torch.bool
            else scores + mask
        )
    return torch.matmul(functional.dropout(scores.softmax(-1), 0.1, False), v)


def folded(q, k, v, mask):
    """Heads folded into the batch, and the mask in the first product, as in Bloom and old BART."""
    shape = q.shape
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * shape[-1] ** -0.5
    if mask is not None:
        scores = scores.view(*shape[:3], -1).add(mask).view(-1, shape[2], mask.shape[-1])
    return torch.bmm(scores.softmax(-1), v).view(shape)


def turned(q, k, v, mask):
    """Keys times queries: the softmax runs over rows."""
    scores = torch.matmul(k, q.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask.transpose(-1, -2)
    return torch.matmul(scores.softmax(-2).transpose(-1, -2), v)


FORMS = {
    "sdpa": (sdpa, HEADS, None),
    "bool": (sdpa, HEADS, "bool"),
    "float": (sdpa, HEADS, "float"),
    "one mask for all keys": (sdpa, HEADS, "rows"),
    "causal op": (lambda q, k, v, mask: sdpa(q, k, v, None, is_causal=True), HEADS, "causal"),
    "scale": (lambda q, k, v, mask: sdpa(q, k, v, mask, scale=1.0), HEADS, "float"),
    "grouped op": (lambda q, k, v, mask: sdpa(q, k, v, mask, enable_gqa=True), 2, "bool"),
    "grouped": (
        lambda q, k, v, mask: sdpa(q, repeat_kv(k, len(q[0]) // 2), repeat_kv(v, len(q[0]) // 2), mask),
        2,
        "bool",
    ),
    "interleaved": (
        lambda q, k, v, mask: sdpa(q, *(x.repeat_interleave(2, 1) for x in (k, v)), mask),
        2,
        "bool",
    ),
    "one head of keys": (
        lambda q, k, v, mask: sdpa(q, *(x.expand(-1, 4, -1, -1) for x in (k, v)), mask),
        1,
        "bool",
    ),
    "eager": (eager, HEADS, None),
    "eager bool": (eager, HEADS, "bool"),
    "eager float": (eager, HEADS, "float"),
    "eager grouped": (lambda q, k, v, mask: eager(q, repeat_kv(k, 2), repeat_kv(v, 2), mask), 2, "float"),
    "folded": (folded, HEADS, "float"),
    "turned": (turned, HEADS, "float"),
}


class Attention(nn.Module):
    """form: written form of attention. key_heads: fewer than the query heads for grouped queries."""

    def __init__(self, form: str, cross: bool = False) -> None:
        super().__init__()
        self.attend, self.key_heads, self.mask = FORMS[form]
        self.heads = 4 if "group" in form or form in ("interleaved", "one head of keys") else HEADS
        self.cross, width = cross, WIDTH // HEADS
        self.q = nn.Linear(WIDTH, self.heads * width)
        self.k = nn.Linear(WIDTH, self.key_heads * width)
        self.v = nn.Linear(WIDTH, self.key_heads * width)
        self.out = nn.Linear(self.heads * width, WIDTH)

    def split(self, x):
        return x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)

    def visible(self, x):
        length = x.shape[1]
        if self.mask is None:
            return None
        if self.mask == "rows":
            return torch.ones(length, 1, dtype=torch.bool)[None, None]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        return mask if self.mask in ("bool", "causal") else torch.zeros(mask.shape).masked_fill(~mask, -1e9)

    def forward(self, x, other=None):
        q, k, v = (
            self.split(self.q(x)),
            *(self.split(m(other if self.cross else x)) for m in (self.k, self.v)),
        )
        return self.out(self.attend(q, k, v, self.visible(x)).transpose(1, 2).flatten(2))

    def expected(self, x, keys, values):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scale = 1.0 if self.attend is FORMS["scale"][0] else None
        mixed = by_hand(q, k, v, keys, values, self.visible(x), scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


DYNAMIC = {"x": {0: "batch", 1: "seq"}}


@pytest.mark.parametrize("form", FORMS)
def test_as_by_hand(form, randomise):
    torch.manual_seed(0)
    module, inputs = Attention(form), torch.randn(3, 5, WIDTH)
    base = surgery.capture(module, (inputs,), dynamic=DYNAMIC)
    program = randomise(base.apply(surgery.Prefix(tokens=3)), 1.0)
    tensors = program.tensors
    assert {n: tuple(t.shape) for n, t in tensors.items()} == dict.fromkeys(
        ("k.prefix.K", "k.prefix.V"), (module.key_heads, 3, WIDTH // HEADS)
    )
    for other in (inputs, torch.randn(2, 7, WIDTH)):
        with torch.no_grad():
            expected = module.expected(other, tensors["k.prefix.K"], tensors["k.prefix.V"])
        assert close(program.run(other), expected)
    assert torch.equal(program.undo("prefix").run(), base.run())


@pytest.mark.parametrize("form", ["bool", "causal op", "eager float", "grouped", "folded"])
def test_one_prefix_stands_before_another(form, randomise):
    torch.manual_seed(0)
    module, inputs = Attention(form), torch.randn(3, 5, WIDTH)
    base = surgery.capture(module, (inputs,), dynamic=DYNAMIC)
    first = base.apply(surgery.Prefix(tokens=3, label="one"))
    both = randomise(first.apply(surgery.Prefix(tokens=2, label="two")), 1.0)
    keys, values = (
        torch.cat([both.tensors[f"k.prefix_two.{n}"], both.tensors[f"k.prefix_one.{n}"]], 1) for n in "KV"
    )
    with torch.no_grad():
        assert close(both.run(), module.expected(inputs, keys, values))
        alone = module.expected(inputs, both.tensors["k.prefix_two.K"], both.tensors["k.prefix_two.V"])
    assert close(both.without("one").run(), alone)


def test_cross_attention_and_which_are_meant(randomise):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.cross = Attention("sdpa"), Attention("sdpa", cross=True)

        def forward(self, x, other):
            x = x + self.own(x)
            return x + self.cross(x, other)

    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, WIDTH), torch.randn(3, 4, WIDTH))
    base = surgery.capture(Block(), inputs)
    names = {
        over: {n.partition(".")[0] for n in base.apply(surgery.Prefix(over=over)).tensors}
        for over in ("self", "cross", "all")
    }
    assert names == {"self": {"own"}, "cross": {"cross"}, "all": {"own", "cross"}}
    program = randomise(base.apply(surgery.Prefix(over="cross", tokens=2)), 1.0)
    module, (x, other) = base.base.loaded.module, inputs
    with torch.no_grad():
        x = x + module.own(x)
        q, k, v = (
            module.cross.split(m(y))
            for m, y in ((module.cross.q, x), (module.cross.k, other), (module.cross.v, other))
        )
        mixed = by_hand(q, k, v, program.tensors["cross.k.prefix.K"], program.tensors["cross.k.prefix.V"])
        expected = x + module.cross.out(mixed.transpose(1, 2).flatten(2))
    assert close(program.run(), expected)


@pytest.mark.parametrize("target", ["attn.qkv", None])
def test_fused_projection(target, randomise):
    from tests.shared.models import attention

    module, inputs = attention()
    program = randomise(surgery.capture(module, inputs).apply(surgery.Prefix(target=target, tokens=3)), 1.0)
    assert sorted(program.tensors) == ["project.prefix.K", "project.prefix.V"]
    (x,) = inputs
    with torch.no_grad():
        q, k, v = (p.transpose(1, 2) for p in module.project(x).view(3, 5, 3, 2, 4).unbind(2))
        mixed = by_hand(q, k, v, *(program.tensors[f"project.prefix.{n}"] for n in "KV"))
        assert close(program.run(), module.out(mixed.transpose(1, 2).flatten(2)))


def test_every_call_of_a_shared_layer_has_a_prefix(randomise):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention("bool")

        def forward(self, x):
            return self.layer(self.layer(x))

    torch.manual_seed(0)
    inputs = torch.randn(3, 5, WIDTH)
    program = randomise(surgery.capture(Twice(), (inputs,)).apply(surgery.Prefix(tokens=2)), 1.0)
    tensors = {n.rpartition(".")[2]: t for n, t in program.tensors.items()}
    assert sorted(tensors) == ["K", "K2", "V", "V2"]
    layer = program.base.loaded.module.layer
    with torch.no_grad():
        expected = layer.expected(
            layer.expected(inputs, tensors["K"], tensors["V"]), tensors["K2"], tensors["V2"]
        )
    assert close(program.run(), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name, options, marks=[pytest.mark.slow] if options and name not in ("llama", "t5") else []
        )
        for name in ("bert", "llama", "t5", "xglm", "bloom", "gpt2")
        for options in ({}, {"positions": "shift"}, {"gate": True})
    ],
)
def test_eager_and_fused_attention_agree(name, options, randomise):
    """The same model with the same prefix, traced with scaled_dot_product_attention and with products."""
    module, ways, refused = zoo.module(name), {}, []
    for way in ("sdpa", "eager"):
        try:
            module.set_attn_implementation(way)
        except ValueError:
            continue
        loaded = zoo.hf_loader.from_model(module, zoo.ARCHITECTURES[name].task)
        program = Program(Base(loaded, trace(loaded), make_plugin_manager()))
        try:
            ways[way] = randomise(program.apply(surgery.Prefix(tokens=3, **options)), 0.5)
        except PassError as error:
            refused.append(str(error))
    assert all("leave out --gate" in why or "use --positions keep" in why for why in refused), refused
    if len(ways) < 2:
        pytest.skip("it is written in one way only, or refused in one")
    args, kwargs = fresh_inputs(ways["sdpa"].captured, other_sizes(ways["sdpa"].captured), 1)
    fused, eager_ = (ways[way].run(*args, **kwargs)["logits"] for way in ("sdpa", "eager"))
    real = kwargs["attention_mask"].bool() if fused.shape[:2] == kwargs["attention_mask"].shape else ...
    assert close(eager_[real], fused[real], 1e-5)  # products are summed in other orders, over two layers


# -- the MLP


def test_a_merge_computes_the_prefix_once(randomise, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(Attention("bool"), Attention("grouped"))
    base = surgery.capture(module, (torch.randn(3, 5, WIDTH),))
    prefix = surgery.Prefix(tokens=3, projection=True, hidden=6)
    program = randomise(base.apply(prefix), 0.5)
    assert {n: tuple(t.shape) for n, t in program.tensors.items()} == {
        "0.k.prefix.E": (3, 8), "0.k.prefix.W1": (6, 8), "0.k.prefix.b1": (6,),
        "0.k.prefix.W2": (16, 6), "0.k.prefix.b2": (16,), "1.k.prefix.W2": (16, 6), "1.k.prefix.b2": (16,),
    }  # fmt: skip
    merged = program.merge()
    assert torch.equal(merged.run(), program.run())
    left = set(merged.state()) - set(base.state())
    assert left == {"0.k.prefix.K", "0.k.prefix.V", "1.k.prefix.K", "1.k.prefix.V"}
    e, w, b = (program.tensors[f"0.k.prefix.{n}"] for n in ("E", "W1", "b1"))
    by_mlp = functional.linear(
        torch.tanh(functional.linear(e, w, b)),
        program.tensors["1.k.prefix.W2"],
        program.tensors["1.k.prefix.b2"],
    )
    expected = by_mlp.view(3, 2, 2, 4).permute(1, 2, 0, 3)  # tokens, k or v, heads, width
    assert close(merged.tensors["1.k.prefix.K"], expected[0])
    assert close(merged.tensors["1.k.prefix.V"], expected[1])
    assert not any(merged.trains(name) for name in left)
    assert len(merged.graph.nodes) == len(base.apply(surgery.Prefix(tokens=3)).graph.nodes)
    merged.save(tmp_path / "merged")
    again = surgery.load(str(tmp_path / "merged"), base=base)
    assert torch.equal(again.run(), program.run())
    assert torch.equal(again.undo("merge").run(), program.run())
    assert set(again.undo("merge").tensors) == set(program.tensors)
    with pytest.raises(JournalError, match="undo 'merge' first"):
        merged.undo("prefix")
    with pytest.raises(PassError, match="nothing can be folded"):
        merged.merge()
    in_place = program.merge(in_place=True)
    assert torch.equal(in_place.run(), merged.run())
    assert set(in_place.tensors) == left


def test_lora_is_folded_beside_it(randomise):
    torch.manual_seed(0)
    base = surgery.capture(Attention("bool"), (torch.randn(3, 5, WIDTH),))
    passes = surgery.Prefix(projection=True), surgery.Lora(target="attn.k", rank=2)
    for order in (passes, passes[::-1]):
        program = randomise(base.apply(*order), 0.3)
        merged = program.merge()
        entry = merged.journal.entries[-1]
        assert entry.options["folded"] == ["lora"]
        assert entry.options["simplified"] == ["prefix"]
        assert entry.options["kept"] == {}
        assert close(merged.run(), program.run(), 1e-5)
        assert set(merged.state()) - set(base.state()) == {"k.prefix.K", "k.prefix.V"}
        assert torch.equal(merged.without("prefix").run(), program.without("prefix").merge().run())


# -- the gate


@pytest.mark.parametrize(
    "form", ["bool", "causal op", "grouped", "grouped op", "eager float", "eager grouped", "folded"]
)
def test_a_gated_prefix_is_exact_at_insertion(form, randomise):
    torch.manual_seed(0)
    module, inputs = Attention(form), torch.randn(3, 5, WIDTH)
    if form == "folded":
        module.mask = None  # its views are not copied
    base = surgery.capture(module, (inputs,), dynamic=DYNAMIC)
    program = base.apply(surgery.Prefix(tokens=3, gate=True))
    assert torch.equal(program.run(), base.run())
    randomise(program, 1.0)
    with torch.no_grad():
        q, k, v = (module.split(m(inputs)) for m in (module.q, module.k, module.v))
        gate = torch.tanh(program.tensors["k.prefix.gate"])
        keys, values = (program.tensors[f"k.prefix.{n}"] for n in "KV")
        none = k[:, :, :0], v[:, :, :0]
        seen = gate * by_hand(q, *none, keys, values)
        own = by_hand(q, k, v, keys[:, :0], values[:, :0], module.visible(inputs))
        half = module.out((own + 0.5 * seen).transpose(1, 2).flatten(2))
        whole = module.out((own + seen).transpose(1, 2).flatten(2))
    assert close(program.run(), whole)
    assert close(program.weighted({"prefix": 0.5}).run(), half)


# -- start and positions


def test_starts_at_keys_and_values_of_the_data():
    torch.manual_seed(0)
    for form in ("bool", "eager grouped", "folded"):
        module, data = Attention(form), torch.randn(2, 6, WIDTH)
        base = surgery.capture(module, (torch.randn(3, 5, WIDTH),), dynamic=DYNAMIC)
        program = base.apply(surgery.Prefix(tokens=12, init="activations"), data=[((data,), {})])
        with torch.no_grad():
            keys = module.split(module.k(data)).transpose(0, 1).flatten(1, 2)  # every token once
        assert close(program.tensors["k.prefix.K"], keys)


def test_positions_behind_a_prefix_leave_fewer_of_a_table():
    base = models.program("minilm")
    program = base.apply(surgery.Prefix(tokens=12, positions="shift"))
    assert program.journal.entries[-1].limits == {"seq": 500}
    index = program.view.node("embedding_2").args[1]
    with torch.no_grad():
        inputs = {k: v[:, :1].expand(-1, 500) for k, v in base.example_inputs[1].items()}
        assert program.run(**inputs)["logits"].shape == (2, 2)
    assert str(index.target) == "aten.add.Tensor"
    assert program.undo("prefix").captured.dynamic_shapes == base.captured.dynamic_shapes


def test_positions_that_are_not_found_are_not_shifted():
    with pytest.raises(
        PassError, match=r"prefix at vit\.layers\.0.*positions are not found.*--positions keep"
    ):
        models.program("vit").apply(surgery.Prefix(positions="shift"))


# -- refusals


class Channels(nn.Module):
    """XCiT's attention: features attend to features."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (2, 4)).permute(0, 2, 3, 1) for m in (self.q, self.k, self.v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 4}, r"prefix at k: refused.*add --projection"),
        (
            {"init": "activations", "projection": True},
            r"prefix at k: refused.*leave out --projection or --init",
        ),
        ({"over": "cross"}, r"no cross-attention"),
        ({"target": "out"}, r"'out'"),
    ],
)
def test_refused_options(options, message):
    base = surgery.capture(Attention("bool"), (torch.randn(3, 5, WIDTH),))
    with pytest.raises(SurgeryError, match=message):
        base.apply(surgery.Prefix(**options))


def test_a_gate_that_would_have_to_copy_views_is_refused():
    base = surgery.capture(Attention("folded"), (torch.randn(3, 5, WIDTH),))
    with pytest.raises(
        PassError, match=r"prefix at k: refused, its scores go through view.*leave out --gate"
    ):
        base.apply(surgery.Prefix(gate=True))


def test_attention_over_features_is_refused():
    base = surgery.capture(Channels(), (torch.randn(3, 6, WIDTH),))
    with pytest.raises(PassError, match=r"prefix at k: refused, it attends over features"):
        base.apply(surgery.Prefix())


def test_a_program_without_attention():
    base = surgery.capture(nn.Linear(4, 4), (torch.randn(3, 4),))
    with pytest.raises(PassError, match="the program has no attention"):
        base.apply(surgery.Prefix())


def test_options_as_the_command_line_gives_them():
    asked = {"tokens": "4", "projection": True, "hidden": "16", "positions": "shift", "over": "self"}
    assert surgery.Prefix.parse(asked) == surgery.Prefix(
        tokens=4, projection=True, hidden=16, positions="shift", over="self"
    )
    with pytest.raises(PassError, match="--tokens"):
        surgery.Prefix.parse({"tokens": "0"})


# -- it learns, and keeps what every pass owes


@pytest.mark.parametrize("options", [{}, {"projection": True, "hidden": 16}, {"gate": True}], ids=str)
def test_learns(options):
    """A prefix on a frozen encoder learns which half of a sequence has the larger numbers."""
    torch.manual_seed(0)
    module = nn.Sequential(
        Attention("bool"), nn.Linear(WIDTH, WIDTH), nn.Tanh(), Attention("float"), nn.Linear(WIDTH, 1)
    )
    inputs = torch.randn(64, 6, WIDTH)
    wanted = torch.sin(3 * inputs.mean((1, 2)))
    base = surgery.capture(module, (inputs,))
    program = base.apply(surgery.Prefix(tokens=4, **options))
    trained = program.module().train()
    before = {n: t.detach().clone() for n, t in trained.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(40):
        loss = (trained(inputs).mean((1, 2)) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    moved = {n for n, t in trained.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == set(program.tensors)


@pytest.mark.parametrize("options", [{}, {"projection": True, "hidden": 8}, {"gate": True}], ids=str)
def test_conformance(options):
    """All checks except another process and ONNX, which `test_ships` covers."""
    checks = ["numerics", "untouched", "inserted", "effect", "tied", "second", "merge", "restored", "weights", "undo",
              "reexport", "unflatten", "gradients", "held", "input"]  # fmt: skip
    for form in ("bool", "causal op", "eager grouped", "folded"):
        if options.get("gate") and form == "folded":
            continue  # refused, see below
        torch.manual_seed(0)
        base = surgery.capture(Attention(form), (torch.randn(3, 5, WIDTH),), dynamic=DYNAMIC)
        check_pass(surgery.Prefix(tokens=3, **options), base, checks=checks)


def test_ships():
    check_pass(
        surgery.Prefix(tokens=4, projection=True, hidden=8), models.program("vit"), checks=["reload", "onnx"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"projection": True, "hidden": 32}, {"gate": True}], ids=str)
@pytest.mark.parametrize("name", ["minilm", "smollm2", "t5", "vit", "mixtral", "wav2vec2"])
def test_whole_kit(name, options):
    check_pass(surgery.Prefix(**options), models.program(name))
