"""Small live models, and helpers to compare them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import LlamaForCausalLM

import surgery
from tests.shared import tiny


@pytest.fixture
def llama():
    """A llama of two layers with grouped keys; every call makes a new one."""
    return small()


@pytest.fixture
def ids():
    return torch.randint(3, 100, (4, 7), generator=torch.Generator().manual_seed(1))


def fill(model, std=0.3):
    """Fill the trainable tensors of a live model's passes with random values; returns its program."""
    torch.manual_seed(2)
    program = surgery.program_of(model)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if tensor.requires_grad:
                tensor.normal_(std=std)
    return program


@pytest.fixture
def randomised():
    return fill


def small():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.llama()).eval()


@pytest.fixture(scope="session")
def one_adapter():
    model = small()
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=2))
    fill(model)
    return model


@pytest.fixture
def adapted(one_adapter):
    """A llama with a random LoRA, new for every test."""
    return deepcopy(one_adapter)


@pytest.fixture(scope="session")
def two_adapters():
    model = small()
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=2, label="film"))
    surgery.apply_(model, surgery.Lora(target="mlp.*", rank=2, label="news"))
    fill(model)
    return model


@pytest.fixture
def two(two_adapters):
    """A llama with two random LoRAs, film and news, new for every test."""
    return deepcopy(two_adapters)
