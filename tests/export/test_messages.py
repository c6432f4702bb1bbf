"""Refusals of an export: each names the node and a remedy that exists."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import ExportError


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.randn(x.shape[0], 4)


class Foreign(nn.Module):
    """An op that torch.onnx cannot translate."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x).R


def test_random_numbers_in_forward_are_named(tmp_path):
    program = surgery.capture(Noise().eval(), (torch.randn(3, 4),))
    with pytest.raises(
        ExportError, match=r"aten.randn.* at node 'randn' .* draws random numbers.*make the noise an"
    ):
        program.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    # Dropout draws none in eval mode.
    surgery.capture(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval(), (torch.randn(3, 4),)).export(
        tmp_path / "model.onnx"
    )


@pytest.mark.parametrize(("format", "group"), [("int4", None), ("nf4", None), ("int8", 8)])
def test_an_early_opset_says_what_it_lacks(format, group, tmp_path):
    base = surgery.capture(nn.Sequential(nn.Linear(64, 8)).eval(), (torch.randn(3, 64),))
    program = base.apply(surgery.Quantize(target="all", format=format, group=group))
    with pytest.raises(
        ExportError, match=r"--opset 18 is too early: .* need opset 21, .*; leave out --opset"
    ):
        program.export(tmp_path / "model.onnx", opset=18)
    assert not list(tmp_path.iterdir())


def test_an_op_of_the_model_is_no_pass(tmp_path):
    program = surgery.capture(Foreign(), (torch.randn(3, 4),), {})
    with pytest.raises(
        ExportError, match=r"has no ONNX form; register a lowering .*, or write it with other ops"
    ) as said:
        program.export(tmp_path / "model.onnx")
    assert "undo" not in str(said.value)
