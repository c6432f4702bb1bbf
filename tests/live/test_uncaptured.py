"""A transformers model that cannot be captured: saved, loaded, merged and written like any other, by its layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, LongformerConfig, LongformerForMaskedLM

import surgery
from surgery.common.errors import LoadError, PassError
from surgery.live.state import state_of

# A merge rounds each weight once: a few units in the last place (6e-8) of the largest output.
ROUNDING = 5e-6


@pytest.fixture
def ids():
    return torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base(tmp_path):
    """A function that loads the same Longformer, from a directory."""
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        attention_window=4, max_position_embeddings=40,
    )  # fmt: skip
    LongformerForMaskedLM(config).save_pretrained(tmp_path / "base")
    return lambda: AutoModelForMaskedLM.from_pretrained(tmp_path / "base").eval()


def stir(program):
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.2)


def test_it_is_saved_loaded_and_written(base, ids, tmp_path):
    model = base()
    before = model(ids).logits.detach()
    stir(surgery.apply_(model, surgery.Lora(target="all-linear", rank=2)))
    assert state_of(model).uncaptured
    logits = model(ids).logits.detach()
    assert float((logits - before).abs().max()) > 0.1
    surgery.save_(model, tmp_path / "saved")
    # The weights are in the directory that the model was loaded from.
    assert not (tmp_path / "saved" / "base.safetensors").exists()
    other = base()
    surgery.load_(other, tmp_path / "saved")
    assert torch.equal(other(ids).logits, logits)
    with pytest.raises(LoadError, match=r"cannot be captured as a whole.*surgery\.load_\(model"):
        surgery.load(str(tmp_path / "saved"))
    surgery.save_(other, tmp_path / "merged", format="hf")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged").eval()
    assert float((merged(ids).logits - logits).abs().max()) <= ROUNDING * float(logits.abs().max())
    surgery.merge_(other)
    assert float((other(ids).logits - logits).abs().max()) <= ROUNDING * float(logits.abs().max())
    surgery.remove_(other)
    assert torch.equal(other(ids).logits, before)


def test_all_linear_leaves_the_head_out(base):
    model = base()
    surgery.apply_(model, surgery.Lora(target="all-linear", rank=2))
    paths = [record.path for record in surgery.program_of(model).journal.find("lora")[0].sites]
    assert paths
    assert not [path for path in paths if path.startswith("lm_head")]
    surgery.remove_(model)
    surgery.apply_(model, surgery.Lora(target="head", rank=2))
    assert {r.path for r in surgery.program_of(model).journal.find("lora")[0].sites} == {
        "lm_head.dense",
        "lm_head.decoder",
    }


class Own(nn.Module):
    """Cannot be captured; its last layer computes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden * 2 if hidden.sum() > 0 else hidden)


def test_the_head_of_an_own_model(tmp_path):
    torch.manual_seed(0)
    model, x = Own(), torch.randn(5, 4)
    stir(surgery.apply_(model, surgery.Lora(target="all-linear", rank=2), inputs=(x,)))
    assert [r.path for r in surgery.program_of(model).journal.find("lora")[0].sites] == ["first"]
    surgery.save_(model, tmp_path / "saved")
    torch.manual_seed(5)
    other = Own()
    surgery.load_(other, tmp_path / "saved", inputs=(x,))
    assert torch.equal(other(x), model(x))
    with pytest.raises(PassError, match="applied to this module already"):
        surgery.load_(other, tmp_path / "saved", inputs=(x,))
