"""A live model that is converted to another dtype: adapters, program and saved directory follow."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import surgery
from tests.live.conftest import fill, small
from tests.techniques.catalogue import of

PASSES = {
    "lora, everywhere": [surgery.Lora(target="all-linear,embed.token", rank=2)],
    "dora": [surgery.Lora(target="attn.*", rank=2, dora=True)],
    "ia3": [of("ia3")],
    "bitfit": [of("bitfit", target="attn.q", add_missing=True)],
    "a side branch": [of("expand", side="dense", size=4, target="mlp.down")],
    "full": [of("full")],
    "int8 and lora": [
        surgery.Quantize(target="attn.*", format="int8-dynamic"),
        surgery.Lora(target="attn.*", rank=2),
    ],
}
# Sums over two layers whose random adapters are as large as the weights; the unit of bfloat16 is 4e-3.
ROUNDING = {torch.float64: 1e-5, torch.bfloat16: 0.3}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lora, everywhere", torch.float64),
        ("int8 and lora", torch.bfloat16),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in PASSES),
    ],
)
def test_everything_follows(name, dtype, ids):
    """float64 shows that nothing else changes, bfloat16 that nothing computes in fp32."""
    model = small()
    surgery.apply_(model, *PASSES[name])
    fill(model, std=0.1)
    before = model(ids).logits.detach().double()
    model.to(dtype)
    logits = model(ids).logits
    assert logits.dtype == dtype
    assert float((logits.double() - before).abs().max()) <= ROUNDING[dtype] * float(before.abs().max())
    graph = surgery.program_of(model).run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert torch.equal(graph, model(ids).logits)
    model.train()(ids, labels=ids).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    surgery.remove_(model.eval())
    assert torch.equal(model(ids).logits, small().to(dtype)(ids).logits)


def test_saved_and_loaded_in_the_new_dtype(ids, tmp_path):
    small().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=2))
    fill(model, std=0.1)
    model.to(torch.bfloat16)
    logits = model(ids).logits
    surgery.save_(model, tmp_path / "saved")
    # The directory of the model gives the weights in bfloat16, but the frequencies of its positions in fp32.
    assert set(load_file(tmp_path / "saved" / "base.safetensors")) == {
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    }
    graph = surgery.load(str(tmp_path / "saved"))
    assert torch.equal(graph.run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"], logits)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base").to(torch.bfloat16)
    surgery.load_(other, tmp_path / "saved")
    assert torch.equal(other(ids).logits, logits)
    surgery.save_(model, tmp_path / "merged", format="hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    # A merge rounds every weight to bfloat16 once more.
    assert float((merged(ids).logits - logits).abs().max()) <= 0.1 * float(logits.abs().max())


def test_a_module_that_was_replaced(ids):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    surgery.apply_(model, surgery.Lora(target="path:0", rank=2), inputs=(x,))
    fill(model)
    model[2] = nn.Linear(8, 7)
    assert torch.equal(surgery.program_of(model).run(x), model(x))
    surgery.remove_(model)
    assert model(x).shape == (5, 7)
    surgery.apply_(model, surgery.Lora(target="path:0", rank=2), inputs=(x,))
    model[0] = nn.Linear(4, 9)
    with pytest.raises(surgery.SurgeryError, match=r"0\.lora\.A is no longer in the model.*remove_"):
        surgery.program_of(model)
