"""Small live models, and how to compare them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import surgery
from tests import tiny


@pytest.fixture
def llama():
    """A llama of two layers with grouped keys, its own every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.llama()).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 100, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def randomised():
    """Random values in all that a live model's passes inserted and that trains."""

    def fill(model, std=0.3):
        torch.manual_seed(2)
        program = surgery.program_of(model)
        with torch.no_grad():
            for tensor in program.tensors.values():
                if tensor.requires_grad:
                    tensor.normal_(std=std)
        return program

    return fill
