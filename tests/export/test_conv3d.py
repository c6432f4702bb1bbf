"""3-D convolutions in onnxruntime: torch.onnx exports them wrongly without a bias, as LoRA adds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from tests.passes.quantize.test_quantize import randomise


class First(nn.Module):
    """Convolution of one image of the batch, without a batch axis."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x[0])


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv3d(2, 4, 3, bias=False),
        nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(1, 0, 2), groups=2, dilation=(1, 1, 2)),
        nn.Conv3d(2, 4, 3, padding="same", bias=False),
        First(nn.Conv3d(2, 4, 3, padding=1)),
    ],
    ids=["no bias", "every argument", "same", "one image"],
)
def test_conv3d(model, tmp_path):
    torch.manual_seed(0)
    program = surgery.capture(model.eval(), (torch.randn(3, 2, 6, 7, 9),))
    adapted = randomise(program.apply(surgery.Lora(target="all", rank=1)))
    # Sums of at most 54 products in fp32: 2e-6 is 30 units in the last place of the largest.
    assert adapted.export(tmp_path / "model.onnx").parity.error <= 2e-6
