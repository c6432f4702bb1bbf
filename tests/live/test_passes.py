"""Every pass on single layers, on a live model: it trains, agrees with its program, and can be removed."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.common.errors import PassError, TargetError
from tests.techniques.catalogue import of

PASSES = {
    "lora": ("lora", {"target": "attn.*", "rank": 2}),
    "lora, everywhere": ("lora", {"target": "all-linear,embed.token", "rank": 2}),
    "dora": ("lora", {"target": "attn.*", "rank": 2, "dora": True}),
    "pissa": ("lora", {"target": "attn.*", "rank": 2, "init": "pissa"}),
    "ia3": ("ia3", {}),
    "bitfit": ("bitfit", {"target": "attn.q", "add_missing": True}),
    "sparse-tune": ("sparse-tune", {"target": "mlp.*", "density": 0.05}),
    "a side branch": ("expand", {"side": "dense", "size": 4, "target": "mlp.down"}),
    "full": ("full", {}),
    "layerwise": ("layerwise", {"top": 1}),
    "embedding": ("embedding", {}),
    "filter": ("filter", {"fraction": 0.2, "target": "mlp.*"}),
}


@pytest.mark.parametrize("name", PASSES)
def test_trains_and_comes_off(llama, ids, name):
    which, options = PASSES[name]
    before, state = llama(ids).logits, {k: v.clone() for k, v in llama.state_dict().items()}
    program = surgery.apply_(llama, of(which, **options))
    groups = program.parameter_groups(0.05)
    live = {id(p) for p in llama.parameters()}
    assert {id(p) for group in groups for p in group["params"]} <= live
    optimiser = torch.optim.Adam(groups)
    llama.train()
    losses = []
    for _ in range(8):
        loss = llama(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    llama.eval()
    assert losses[-1] < losses[0]
    trained = llama(ids).logits
    assert not torch.equal(trained, before)
    mask = torch.ones_like(ids)
    assert torch.equal(program.run(input_ids=ids, attention_mask=mask)["logits"], trained)
    surgery.remove_(llama)
    assert torch.equal(llama(ids).logits, before)
    after = llama.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_only_what_is_selected_moves(llama, ids):
    kept = {n: p.detach().clone() for n, p in llama.named_parameters()}
    program = surgery.apply_(llama, of("filter", fraction=0.25, target="mlp.up"))
    optimiser = torch.optim.SGD(program.parameter_groups(1.0))
    llama.train()
    llama(ids, labels=ids).loss.backward()
    optimiser.step()
    moved = {n: (p != kept[n]) for n, p in llama.named_parameters() if not torch.equal(p, kept[n])}
    assert set(moved) == {f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)}
    for where in moved.values():
        assert int(where.any(dim=1).sum()) == 16  # filters, of 64


@pytest.mark.parametrize(
    ("pass_", "error", "message"),
    [
        (surgery.Prefix(), PassError, "prefix changes more than single layers, .*surgery.load"),
        (surgery.Prompt(), PassError, "prompt changes more than single layers"),
        (surgery.Expand(deeper=1), PassError, "expand changes more than single layers"),
        (
            surgery.Expand(side="conv", target="mlp.up"),
            PassError,
            "it reads earlier positions, .* with a cache",
        ),
        (surgery.Lora(target="nowhere"), TargetError, "target 'nowhere' matches no"),
    ],
)
def test_refused_and_untouched(llama, ids, pass_, error, message):
    before, keys = llama(ids).logits, list(llama.state_dict())
    with pytest.raises(error, match=message):
        surgery.apply_(llama, pass_)
    assert torch.equal(llama(ids).logits, before)
    assert list(llama.state_dict()) == keys
    with pytest.raises(PassError, match="no pass has been applied"):
        surgery.program_of(llama)


def test_a_side_convolution_on_an_encoder():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = BertModel(config).eval()
    ids = torch.randint(3, 99, (2, 9))
    before = model(ids).last_hidden_state
    program = surgery.apply_(model, surgery.Expand(side="conv", size=4, target="mlp.up"))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_()
    moved = model(ids).last_hidden_state
    assert not torch.equal(moved, before)
    graph = program.run(
        input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids)
    )
    torch.testing.assert_close(graph["last_hidden_state"], moved)


def test_weights_that_a_parent_uses_are_refused_by_name():
    from tests.zoo.zoo import module

    report = surgery.plan_(module("wavlm"), surgery.Lora(target="attn.q,mlp.up", rank=2))
    rows = report.passes[-1].sites
    refused = {row.site.role: row.refusal for row in rows if row.refusal}
    assert "attention.q_proj: the model uses its weight without calling it" in refused["attn.q"]
    assert {row.site.role for row in rows if not row.refusal} == {"mlp.up"}


def test_a_model_that_cannot_be_captured(ids):
    from tests.zoo.zoo import build, module

    model = module("vilt").eval()
    loaded = build("vilt")
    torch.manual_seed(0)
    with pytest.raises(TargetError, match="cannot be captured, so it has no roles, only paths"):
        surgery.apply_(model, surgery.Lora(target="attn.q"))
    program = surgery.apply_(model, surgery.Lora(target="query,value", rank=2))
    assert len(program.journal.find("lora")[0].sites) == 4

    def outputs():
        torch.manual_seed(0)
        return model(**loaded.kwargs).last_hidden_state

    before = outputs()
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_()
    assert not torch.equal(outputs(), before)
    surgery.remove_(model)
    assert torch.equal(outputs(), before)


def test_a_copy_of_a_model_knows_what_it_cannot_do():
    from copy import deepcopy

    from tests.zoo.zoo import module

    model = module("wavlm")
    surgery.apply_(model, surgery.Lora(target="mlp.up", rank=2))
    with pytest.raises(PassError, match="the model uses its weight without calling it"):
        surgery.apply_(deepcopy(model), surgery.Lora(target="attn.q", rank=2, label="more"))


@pytest.mark.parametrize("format", ["int4", "int8-dynamic"])
def test_quantized_in_place(format, llama, ids, randomised):
    """Codes in a live model with an adapter; removing both restores the model bit for bit."""
    before = llama(ids).logits
    surgery.apply_(llama, surgery.Quantize(target="attn.*,mlp.*", format=format))
    rounded = llama(ids).logits
    assert not torch.equal(rounded, before)
    surgery.apply_(llama, surgery.Lora(target="attn.*", rank=2))
    assert torch.equal(llama(ids).logits, rounded)
    program = randomised(llama)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(program.run(input_ids=ids, attention_mask=mask)["logits"], llama(ids).logits)
    llama(ids).logits.sum().backward()
    assert {n for n, p in llama.named_parameters() if p.grad is not None} == {
        n for n in program.tensors if "lora" in n
    }
    surgery.remove_(llama)
    assert torch.equal(llama(ids).logits, before)
