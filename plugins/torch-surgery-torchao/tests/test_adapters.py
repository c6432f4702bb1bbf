"""Adapters that compute with the weight, on int8-static: they read its codes, and the op stays an int8 product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_surgery_torchao import Int8Static

import surgery

TARGET = "path:0,path:2"


@pytest.mark.parametrize(
    "pass_",
    [
        surgery.Lora(target=TARGET, rank=3, dora=True),
        surgery.Lora(target=TARGET, rank=3, dora=True, full_gradient=True),
        surgery.SparseTune(target=TARGET, density=0.2),
        surgery.SparseTune(target=TARGET, density=0.2, by="random"),
    ],
    ids=["dora", "dora-full", "magnitude", "random"],
)
def test_they_land_train_export_and_come_off(pass_, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
    base = surgery.capture(model, torch.randn(4, 8)).apply(Int8Static(target=f"{TARGET},path:4"))
    adapted = base.apply(pass_)
    assert torch.equal(adapted.run(), base.run())
    with torch.no_grad():
        own = [t for t in adapted.tensors.values() if t.requires_grad]
        for tensor in own:
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    assert not torch.equal(adapted.run(), base.run())
    adapted.module()(*base.example_inputs[0]).square().sum().backward()
    assert own
    assert all(t.grad is not None and t.grad.any() for t in own)
    # With this seed no activation lies on the edge between two steps, so only sums are rounded otherwise (fp32).
    assert adapted.export(tmp_path / "model.onnx").parity.error < 1e-5
    assert torch.equal(adapted.undo(adapted.journal.entries[-1].id).run(), base.run())
    refused = surgery.Lora(target=TARGET, init="pissa")
    with pytest.raises(surgery.SurgeryError, match="apply it after this"):
        base.apply(refused)
