"""Features of a model that surgery leaves intact: generate, modes, copies, compilation, classes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import T5ForConditionalGeneration

import surgery
from surgery.common.errors import PassError
from tests.shared import tiny
from tests.zoo import zoo


def test_exact_at_insertion_and_after_removal(llama, ids):
    flags = {name: p.requires_grad for name, p in llama.named_parameters()}
    keys, before = list(llama.state_dict()), llama(ids).logits
    surgery.apply_(llama, surgery.Lora(target="attn.*", rank=2))
    assert torch.equal(llama(ids).logits, before)
    trained = {name for name, p in llama.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2
    assert all(".lora." in name for name in trained)
    surgery.remove_(llama)
    assert torch.equal(llama(ids).logits, before)
    assert list(llama.state_dict()) == keys
    assert {name: p.requires_grad for name, p in llama.named_parameters()} == flags
    assert type(llama.model.layers[0].self_attn.q_proj) is nn.Linear


def test_it_is_its_program(adapted, ids):
    program = surgery.program_of(adapted)
    mask = torch.ones_like(ids)
    assert torch.equal(program.run(input_ids=ids, attention_mask=mask)["logits"], adapted(ids).logits)


def test_generate_with_and_without_a_cache(adapted, ids):
    given = {"max_new_tokens": 6, "do_sample": False}
    with_cache = adapted.generate(ids, **given)
    assert torch.equal(with_cache, adapted.generate(ids, use_cache=False, **given))
    with surgery.using(adapted):
        assert not torch.equal(with_cache, adapted.generate(ids, **given))


def test_classes_and_attributes(adapted):
    layer = adapted.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"
    assert (layer.in_features, layer.out_features, layer.bias) == (32, 32, None)
    assert adapted.config.use_cache


def test_a_deep_copy_is_its_own(adapted, ids):
    before = adapted(ids).logits
    other = copy.deepcopy(adapted)
    assert torch.equal(other(ids).logits, before)
    with torch.no_grad():
        for tensor in surgery.program_of(other).tensors.values():
            tensor.zero_()
    assert torch.equal(adapted(ids).logits, before)
    surgery.remove_(other)
    assert torch.equal(adapted(ids).logits, before)
    assert not torch.equal(other(ids).logits, before)


def test_compiled_as_one_graph(adapted, ids):
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids).logits, adapted(ids).logits)


def test_gradient_checkpointing(adapted, ids):
    adapted.train()
    adapted(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted(ids, labels=ids).loss.backward()
    again = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys()
    assert len(plain) == 16
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad)


def test_saved_pretrained_holds_the_adapters(adapted, tmp_path):
    from safetensors.torch import load_file

    adapted.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert torch.equal(
        kept["model.layers.0.self_attn.q_proj.lora.A"], adapted.model.layers[0].self_attn.q_proj.lora.A
    )


def test_dropout_obeys_the_mode(llama, ids, randomised):
    surgery.apply_(llama, surgery.Lora(target="attn.*", rank=2, dropout=0.5))
    randomised(llama)
    assert torch.equal(llama(ids).logits, llama(ids).logits)
    llama.train()
    assert not torch.equal(llama(ids).logits, llama(ids).logits)


def test_a_layer_that_is_called_with_flat_rows(adapted):
    layer = adapted.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))
    torch.testing.assert_close(layer(input=x), layer(x), rtol=0, atol=0)


def test_modes_are_left_as_they_are(llama):
    llama.train()
    llama.model.layers[0].eval()
    before = {path: module.training for path, module in llama.named_modules()}
    surgery.apply_(llama, surgery.Lora(target="attn.*", rank=2))
    after = {path: module.training for path, module in llama.named_modules()}
    assert {path: after[path] for path in before} == before


def test_uses_of_a_tied_table_are_told_apart(randomised):
    """T5's encoder and decoder read one embedding table, each through its own layer."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(tiny.t5()).eval()
    program = surgery.apply_(model, surgery.Lora(target="embed.*", rank=2))
    randomised(model)
    inputs = {name: torch.randint(3, 90, (2, 5)) for name in ("input_ids", "decoder_input_ids")}
    assert len([n for n in program.tensors if n.endswith("embed_tokens.lora.A")]) == 2
    expected = program.run(**inputs, attention_mask=torch.ones(2, 5, dtype=torch.long))["logits"]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_a_layer_that_is_given_more_is_refused(llama):
    """BART's position embedding also gets an offset as input."""
    torch.manual_seed(0)
    model = zoo.module("bart")
    with pytest.raises(PassError, match=r"embed_positions.*the model gives its forward .* too"):
        surgery.apply_(model, surgery.Lora(target="decoder.embed_positions"))


def test_a_weight_that_no_call_reaches_is_not_missed_silently():
    """Mamba multiplies by the weight of a layer that it never calls: a LoRA works in a graph, but not live."""
    from surgery.capture import hf

    torch.manual_seed(0)
    loaded = hf.from_model(zoo.module("mamba"))
    program = surgery.capture(loaded.module, dict(loaded.kwargs)).apply(
        surgery.Lora(target="dt_proj", rank=2)
    )
    with pytest.raises(PassError, match=r"dt_proj: the model uses its weight without calling a layer"):
        program.live()
    with pytest.raises(PassError, match=r"dt_proj.*cannot be rewritten in place"):
        surgery.apply_(zoo.module("mamba"), surgery.Lora(target="dt_proj", rank=2))


def test_live_again_with_the_caches_that_it_had(tmp_path, randomised):
    """T5's encoder has its own configuration, with its cache off."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(tiny.t5()).save_pretrained(tmp_path)
    program = surgery.load(f"hf:{tmp_path}", task="text2text-generation").apply(surgery.Lora(target="attn.*"))
    live, plain = program.live(), T5ForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.randint(3, 90, (2, 5))
    assert [live.encoder.config.use_cache, live.decoder.config.use_cache] == [False, True]
    assert torch.equal(live.generate(ids, max_new_tokens=6), plain.generate(ids, max_new_tokens=6))
    randomised(live)
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():  # with gradients torch takes another attention
        assert torch.equal(program.run(**inputs)["logits"], live(**inputs).logits)
