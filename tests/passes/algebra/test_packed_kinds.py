"""Adapters on packed weights: train mode, parts, other kinds and precisions, and weights that cannot be unpacked.

The tolerance is that of test_packed_ops: 1e-5 of the values' scale, for sums of a dozen products in fp32 in another
order.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.api import PassError
from surgery.engine.contract.observe import relative_difference
from surgery.engine.probe import Probe
from surgery.passes.bitfit import Bitfit
from surgery.passes.heads.head import Head
from surgery.passes.heads.vocab import Vocab
from surgery.passes.measure.fisher import fisher
from surgery.passes.prompt.prompt import Prompt
from surgery.passes.sparse.sparse_tune import SparseTune
from tests.shared.packed import (
    PASSES,
    SCALE,
    WITHIN,
    Conv8,
    Embedding8,
    Linear4,
    Opaque,
    capture,
    formula,
    tensors_at,
    trained,
)


class Dropped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_dora_with_dropout_sends_the_dropped_input_through_the_op():
    torch.manual_seed(3)
    model = Dropped(Linear4(8, 6))
    x = torch.randn(4, 8)
    adapted = trained(capture(model, x).apply(surgery.Lora(target="layer", rank=3, dora=True, dropout=0.5)))
    module, own = adapted.module().train(), tensors_at(adapted, "layer")
    torch.manual_seed(1)
    found = module(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    weight, update = model.layer.weight(), SCALE * own["B"] @ own["A"]
    factor = (own["m"] / (weight + update).norm(dim=1))[:, None]
    wanted = F.linear(x, weight, model.layer.bias) + F.linear(
        dropped, (factor - 1) * weight + factor * update
    )
    assert relative_difference(wanted, found) < WITHIN


class Attention(nn.Module):
    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.qkv, self.out = projection, nn.Linear(8, 8)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Ids(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = embedding, nn.Linear(8, 5)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


class Image(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.head = conv, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


def float_twin(layer):
    if isinstance(layer, Linear4):
        twin = nn.Linear(layer.packed.shape[1] * 2, layer.packed.shape[0])
    elif isinstance(layer, Embedding8):
        twin = nn.Embedding(*layer.packed.shape)
    else:
        wide = layer.packed.shape[1] * layer.groups
        twin = nn.Conv2d(wide, layer.packed.shape[0], 3, 2, 1, groups=layer.groups)
    with torch.no_grad():
        twin.weight.copy_(layer.weight())
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


CASES = {
    "parts": (Attention, lambda: Linear4(8, 24), "attn.q,attn.v", lambda: torch.randn(2, 5, 8)),
    "embedding": (Ids, lambda: Embedding8(11, 8), "embed", lambda: torch.randint(0, 11, (2, 5))),
    "conv": (Image, lambda: Conv8(4, 6), "conv", lambda: torch.randn(2, 4, 9, 9)),
    "grouped": (Image, lambda: Conv8(4, 6, groups=2), "conv", lambda: torch.randn(2, 4, 9, 9)),
}
KINDS = {
    "lora": {},
    "dora": {"dora": True},
    "dora-full": {"dora": True, "full_gradient": True},
    "pissa": {"init": "pissa"},
    "sparse": None,
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("case", CASES)
def test_other_weights_as_on_their_floats(case, options):
    model, layer, target, inputs = CASES[case]
    torch.manual_seed(3)
    layer, x = layer(), inputs()
    both = []
    for own in (layer, float_twin(layer)):
        torch.manual_seed(5)  # the rest of the model, and A where it starts at random
        program = capture(model(own), x)
        chosen = (
            SparseTune(target=target, density=0.2)
            if options is None
            else surgery.Lora(target=target, rank=2, **options)
        )
        torch.manual_seed(7)
        adapted = program.apply(chosen)
        assert relative_difference(program.run(), adapted.run()) < WITHIN
        both.append((program, trained(adapted)))
    (program, packed), (_, floats) = both
    given = {name.replace("packed_", "").replace("weight.", ""): t for name, t in packed.tensors.items()}
    wanted = {name: t for name, t in floats.tensors.items() if t.requires_grad}
    assert set(wanted) <= set(given)
    with torch.no_grad():
        for name, tensor in wanted.items():
            given[name].copy_(tensor)
    outputs = [adapted.module()(x) for adapted in (packed, floats)]
    assert relative_difference(outputs[1], outputs[0]) < WITHIN
    assert relative_difference(program.run(), outputs[0]) > 1e-3
    probing = torch.randn_like(outputs[0])
    for output in outputs:
        (output * probing).sum().backward()
    for name, tensor in wanted.items():
        assert relative_difference(tensor.grad, given[name].grad) < WITHIN, name
    assert torch.equal(packed.undo(packed.journal.entries[-1].id).run(), program.run())


def test_a_module_that_is_used_twice_unpacks_its_weight_once():
    torch.manual_seed(3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = Linear4(8, 8)

        def forward(self, x):
            return self.own(torch.tanh(self.own(x)))

    model, x = Twice(), torch.randn(3, 8)
    for pass_ in (surgery.Lora(target="own", rank=3, dora=True), SparseTune(target="own", density=0.2)):
        adapted = trained(capture(model, x).apply(pass_))
        own = tensors_at(adapted, "own")
        hidden = torch.tanh(formula(pass_, model.own, x, x, own, own))
        wanted = formula(pass_, model.own, hidden, hidden, own, own)
        assert relative_difference(wanted, adapted.run()) < WITHIN
        once = [n for n in adapted.graph.nodes if "norm" in str(n.target) or "scatter" in str(n.target)]
        assert len(once) == 1


def test_the_fisher_information_is_that_of_the_floats():
    torch.manual_seed(3)
    layer, x = Linear4(8, 6), torch.randn(16, 8)
    both = []
    for own in (layer, float_twin(layer)):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), own, nn.Tanh(), nn.Linear(6, 4))
        program = capture(model, x)
        name = "2.packed" if own is layer else "2.weight"
        pass_ = SparseTune(target="path:2.packed" if own is layer else "path:2", by="gradient", count=9)
        adapted = program.apply(pass_, data=[((x,), {})])
        (entry,) = [e for e in adapted.journal if e.pass_name == "sparse-tune"]
        both.append(adapted.tensors[entry.sites[0].tensors["indices"]])
        both.append(fisher(Probe(program, [((x,), {})]), name))
    assert torch.equal(both[0], both[2])
    assert relative_difference(both[3], both[1]) < WITHIN


def test_half_precision():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), Linear4(8, 12)).to(torch.bfloat16)
    program = capture(model, torch.randn(3, 6, dtype=torch.bfloat16))
    for pass_ in PASSES.values():
        adapted = program.apply(pass_.model_copy(update={"target": "path:1.packed"}))
        assert torch.equal(adapted.run(), program.run())
        assert all(t.dtype == torch.bfloat16 for t in adapted.tensors.values() if t.requires_grad)


# -- the others


def test_other_adapters_land():
    torch.manual_seed(3)

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = Embedding8(11, 8), Linear4(8, 16), Linear4(16, 8)
            self.head = Linear4(8, 11)

        def forward(self, ids):
            x = self.embed(ids)
            x = x + self.down(torch.relu(self.up(x)))
            return self.head(x)

    ids = torch.randint(0, 11, (2, 5))
    model = Language()
    program = capture(model, ids)
    grown = program.apply(Vocab(tokens=3, target="embed,head"))
    assert torch.equal(grown.run()[..., :11], program.run())
    rows = next(t for n, t in grown.tensors.items() if n.startswith("head") and n.endswith("rows"))
    assert relative_difference(model.head.weight().mean(0).expand(3, -1), rows) < WITHIN
    rows = next(t for n, t in grown.tensors.items() if n.startswith("embed") and n.endswith("rows"))
    assert rows.shape == (3, 8)
    smaller = program.apply(Head(mode="resize", keep="4,0,7"))
    assert relative_difference(program.run()[..., [4, 0, 7]], smaller.run()) < WITHIN
    for pass_ in (Bitfit(target="up,down,head,embed"), surgery.Adapter(size=4, target="down")):
        adapted = program.apply(pass_)
        assert torch.equal(adapted.run(), program.run())
    missing = program.apply(Bitfit(target="up", add_missing=True))
    assert torch.equal(missing.run(), program.run())


def test_a_prompt_starts_at_rows_of_a_packed_table():
    torch.manual_seed(3)
    model = Ids(Embedding8(11, 8))
    program = capture(model, torch.randint(0, 11, (2, 5)))
    adapted = program.apply(Prompt(tokens=2, init="vocabulary"))
    (tokens,) = adapted.tensors.values()
    table = model.embed.weight()
    assert all(any(torch.equal(row, known) for known in table) for row in tokens)


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, None])
def test_what_branches_on_values_is_refused(options):
    model = nn.Sequential(nn.Linear(6, 8), Opaque())
    program = capture(model, torch.randn(3, 6))
    target = "path:1.packed"
    pass_ = SparseTune(target=target) if options is None else surgery.Lora(target=target, **options)
    remedy = "use lora" if options is None else "leave --(dora|init pissa) out"
    with pytest.raises(
        PassError, match=rf"1\.packed.*dequantize of surgery_packed\.opaque\.default.*{remedy}"
    ):
        program.apply(pass_)
    assert torch.equal(program.apply(surgery.Lora(target=target)).run(), program.run())
