"""Weights with several names or uses: merged values under every name, codes stored once, and the cause of a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

import surgery
from surgery.common.errors import PassError
from surgery.engine.program import Program


def stir(program: Program) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if tensor.requires_grad:
                tensor.normal_(std=0.3)


class TwoNames(nn.Module):
    """A layer under two names, and a layer whose weight has another name that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.second = nn.Linear(4, 4)
        self.unread = nn.Linear(4, 4)
        self.unread.weight = self.second.weight

    def forward(self, x):
        return self.second(self.again(x).relu())


def test_merged_values_under_every_name():
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    program = surgery.capture(TwoNames(), x).apply(surgery.Lora(target="all", rank=2))
    stir(program)
    expected, merged = program.run(x), program.merge()
    state = merged.module().state_dict()
    assert torch.equal(state["again.weight"], state["first.weight"])
    other = TwoNames()
    other.load_state_dict(state)
    # A merge rounds each weight once: a few units in the last place (6e-8) of the largest output.
    torch.testing.assert_close(other(x), expected, rtol=0, atol=5e-6 * float(expected.abs().max()))
    assert torch.equal(merged.undo("merge").run(x), expected)


class Scaled(nn.Module):
    """Reads the table of its embedding again, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return functional.linear(self.body(self.table(ids)), self.table.weight * 0.3)


def test_a_merge_names_who_else_reads_the_weight():
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (3, 5))
    program = surgery.capture(Scaled(), ids).apply(surgery.Lora(target="path:table", rank=2))
    stir(program)
    with pytest.raises(PassError, match=r"table\.weight is also read to compute the weight of aten\.linear"):
        program.merge()
    both = program.apply(surgery.Lora(target="path:body", rank=2, label="body"))
    stir(both)
    merged = both.merge()  # what can be folded is
    assert "also read" in merged.journal.find("merge")[0].options["kept"]["lora"]
    torch.testing.assert_close(merged.run(ids), both.run(ids))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 whose vocabulary is most of it: one table for encoder, decoder and head."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20_000, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    folder = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(folder / "base")
    return folder


def size(path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


@pytest.mark.slow  # the saved directory below has the same tensors
def test_the_codes_of_a_tied_table_are_in_an_onnx_file_once(t5, tmp_path):
    program = surgery.load(f"hf:{t5 / 'base'}", task="text2text-generation")
    program.apply(surgery.Quantize(target="all", format="int8")).export(tmp_path / "model.onnx")
    assert size(tmp_path / "model.onnx") < 0.3 * size(t5 / "base")


@pytest.mark.parametrize("format", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_the_codes_of_a_tied_table_are_stored_once(t5, format, tmp_path):
    program = surgery.load(f"hf:{t5 / 'base'}", task="text2text-generation")
    quantized = program.apply(surgery.Quantize(target="all", format=format))
    quantized.save(tmp_path / "saved")
    assert size(tmp_path / "saved") < 0.3 * size(t5 / "base")
    again = surgery.load(str(tmp_path / "saved"))
    expected = quantized.run()["logits"]
    assert torch.equal(again.run()["logits"], expected)
    assert torch.equal(quantized.undo("quantize").run()["logits"], program.run()["logits"])
    live = quantized.live()
    args, kwargs = quantized.example_inputs
    with torch.no_grad():
        assert torch.equal(live(*args, **kwargs).logits, expected)
    # An adapter of one use does not reach the others.
    adapted = again.apply(surgery.Lora(target="head", rank=2))
    stir(adapted)
    merged = adapted.merge(quantized="requantize")
    difference = (merged.run()["logits"] - adapted.run()["logits"]).abs().max()
    assert float(difference) < 0.2 * float((adapted.run()["logits"] - expected).abs().max())
