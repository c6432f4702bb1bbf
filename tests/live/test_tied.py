"""Tied weights in a live model: a merge changes only the use with the adapter, and the model reports it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

import surgery
from tests.shared import tiny

# A merge rounds each weight once: a few units in the last place (6e-8) of the largest logit.
ROUNDING = 5e-6


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    return model


MODELS = {
    "llama": llama,
    "bert": bert,
    "gpt2": lambda: GPT2LMHeadModel(tiny.gpt2()),
    "t5": lambda: T5ForConditionalGeneration(tiny.t5()),
}


def logits(model, ids):
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(ids, **more).logits.detach()


@pytest.mark.parametrize("target", ["head", "embed.token", "head,embed.token"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_as_unmerged_and_back(name, target):
    torch.manual_seed(0)
    model, ids = MODELS[name]().eval(), torch.randint(3, 99, (2, 7))
    base = logits(model, ids)
    program = surgery.apply_(model, surgery.Lora(target=target, rank=4))
    stir(program)
    adapted = logits(model, ids)
    scale = float(adapted.abs().max())
    assert float((adapted - base).abs().max()) > 0.1 * scale
    surgery.merge_(model)
    assert float((logits(model, ids) - adapted).abs().max()) < ROUNDING * scale
    surgery.remove_(model, "merge")
    assert torch.equal(logits(model, ids), adapted)
    surgery.remove_(model)
    assert torch.equal(logits(model, ids), base)


def test_save_pretrained_after_a_merge_that_unties(tmp_path):
    torch.manual_seed(0)
    model, ids = llama().eval(), torch.randint(3, 99, (2, 7))
    stir(surgery.apply_(model, surgery.Lora(target="head", rank=4)))
    surgery.merge_(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))
    surgery.remove_(model)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def stir(program):
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.3)
