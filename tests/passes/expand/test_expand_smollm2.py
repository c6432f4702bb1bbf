"""SmolLM2, four blocks deeper and wider: its logits do not change, and it exports to ONNX."""

from __future__ import annotations

import pytest
import torch

import surgery
from tests.techniques.catalogue import of
from tests.techniques.models import program

pytestmark = pytest.mark.slow

# Over 30 layers of which every MLP sums its products in another order; fp32, of the logits' scale.
WIDER = 2e-5


@pytest.fixture(scope="module")
def base() -> surgery.Program:
    return program("smollm2", layers=None)


@pytest.fixture(scope="module")
def deeper(base) -> surgery.Program:
    return base.apply(of("expand", deeper=4))


def test_deeper_by_four(base, deeper):
    assert torch.equal(deeper.run()["logits"], base.run()["logits"])
    copied = [r.decided["block"] for r in deeper.journal.find("expand")[0].sites]
    assert copied == [f"model.layers.{n}" for n in (7, 14, 22, 29)]
    # Every copy has all the weights of its layer, and only the copies train.
    layer = sum(t.numel() for n, t in base.state().items() if n.startswith("model.layers.0."))
    assert deeper.count_parameters() == (base.count_parameters()[0] + 4 * layer, 4 * layer)


def test_deeper_and_wider_to_onnx(base, deeper, tmp_path):
    both = deeper.apply(of("expand", wider="1.25", label="wide"))
    before, after = base.run()["logits"], both.run()["logits"]
    assert float((after - before).abs().max()) <= WIDER * float(before.abs().max())
    # The copies' MLPs are widened with the rest.
    assert len(both.journal.find("wide")[0].sites) == 34
    with torch.no_grad():  # as trained: the copies do something, and the units that were doubled have parted
        for name in both.journal.find("expand")[0].tensor_names + both.journal.find("wide")[0].tensor_names:
            both.tensors[name].add_(torch.randn_like(both.tensors[name]), alpha=0.01)
    report = both.export(tmp_path / "wide.onnx")
    assert report.parity.ok
