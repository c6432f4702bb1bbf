"""Programs and a browser for the tests of pages."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import surgery
from tests.export.show.browser import Browser
from tests.shared import tiny


@pytest.fixture(scope="session")
def browser():
    opened = Browser()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory) -> str:
    """A llama of two layers whose output layer is tied to its embedding."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = tiny.llama()
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama(llama_path) -> surgery.Program:
    return surgery.load(f"hf:{llama_path}")


@pytest.fixture(scope="session")
def changed(llama) -> surgery.Program:
    """The llama with int4 feed-forward weights and LoRA of random weights on the queries of its second layer."""
    program = llama.apply(
        surgery.Quantize(target="mlp.*", format="int4", group=16),
        surgery.Lora(target="model.layers.1.self_attn.q_proj", rank=4),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if ".lora." in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return program
