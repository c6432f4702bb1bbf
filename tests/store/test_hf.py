"""Transformers directories: the files that vLLM, llama.cpp's converter and `from_pretrained` expect."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertForMaskedLM,
    GenerationConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

import surgery
from surgery.cli import main
from surgery.common.errors import ExportError
from tests.conftest import minilm_path
from tests.shared import tiny

MERGED = 2e-4  # as Program.merge allows: every weight is rounded once more


@pytest.fixture(params=["llama", "gpt2", "t5"])
def made(request, tmp_path):
    """A base of its own with a tokenizer and settings for generation, its class, and a live random LoRA in it."""
    cls, config, auto = {
        "llama": (LlamaForCausalLM, tiny.llama(), AutoModelForCausalLM),
        "gpt2": (GPT2LMHeadModel, tiny.gpt2(), AutoModelForCausalLM),
        "t5": (T5ForConditionalGeneration, tiny.t5(), AutoModelForSeq2SeqLM),
    }[request.param]
    torch.manual_seed(0)
    model = cls(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=7, repetition_penalty=1.3, eos_token_id=[2, 5], decoder_start_token_id=0
    )
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base").eval()
    program = surgery.apply_(model, surgery.Lora(target="attn.*", rank=2))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.2)
    return tmp_path, auto, model


def logits(model):
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def names(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # without it transformers refuses the file
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def test_written_from_a_live_model_in_shards(made):
    folder, auto, model = made
    before = logits(model)
    surgery.save_(model, folder / "hf", format="hf", max_shard_size="20KB")
    assert torch.equal(logits(model), before)
    files = sorted((folder / "hf").glob("model-*.safetensors"))
    index = json.loads((folder / "hf" / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(file.stat().st_size < 24_000 for file in files)
    # The names of the base, a tied weight once, nothing else.
    base, written = names(folder / "base"), names(folder / "hf")
    assert set(written) == set(base) == set(index["weight_map"])
    assert any(not torch.equal(written[name], base[name]) for name in base)
    assert sum(not torch.equal(written[name], base[name]) for name in base) == len(
        {site.path for entry in surgery.program_of(model).journal for site in entry.sites}
    )
    reopened = auto.from_pretrained(folder / "hf").eval()
    assert float((logits(reopened) - before).abs().max()) <= MERGED * float(before.abs().max())
    assert reopened.config.architectures == [type(model).__name__]


def test_companions(made):
    folder, auto, model = made
    surgery.save_(model, folder / "hf", format="hf")
    own, base = (json.loads((folder / name / "config.json").read_text()) for name in ("hf", "base"))
    assert own == base
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        theirs, mine = (json.loads((folder / d / name).read_text()) for d in ("base", "hf"))
        assert theirs == mine, name
    ids = torch.randint(3, 90, (1, 5))
    reopened = auto.from_pretrained(folder / "hf")
    reopened.generation_config.eos_token_id = None  # seven tokens, whatever they are
    assert reopened.generate(ids).shape[1] - (0 if model.config.is_encoder_decoder else 5) in (7, 8)
    assert AutoTokenizer.from_pretrained(folder / "hf")("a film").input_ids


def test_from_the_command_line(made, capsys):
    folder, auto, model = made
    surgery.save_(model, folder / "adapted")

    def run(*line):
        with pytest.raises(SystemExit) as raised:
            main(["merge", str(folder / "adapted"), *map(str, line)])
        return raised.value.code, capsys.readouterr().err

    assert run("--format", "hf", "--max-shard-size", "20KB", "-o", folder / "hf")[0] == 0
    assert len([*(folder / "hf").glob("model-*.safetensors")]) > 1
    assert float((logits(auto.from_pretrained(folder / "hf").eval()) - logits(model)).abs().max()) <= MERGED
    code, said = run("--format", "hf", "--max-shard-size", "lots", "-o", folder / "no")
    assert code == 2
    assert "--max-shard-size lots: write a size" in said
    code, said = run("--max-shard-size", "5GB", "-o", folder / "no")
    assert code == 2
    assert "--max-shard-size needs --format hf" in said
    assert not (folder / "no").exists()


@pytest.mark.parametrize("cls", [BertForMaskedLM, RobertaForMaskedLM])
@pytest.mark.parametrize("target", ["head", "embed"])
def test_a_bias_that_was_tied_as_well(cls, target, tmp_path, randomise):
    """A merged head is untied, and the output layer's bias needs a tensor of its own: it was lost, and read as zero."""
    config = cls.config_class(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "base")
    base = surgery.load(f"hf:{tmp_path / 'base'}", task="fill-mask")
    merged = randomise(base.apply(surgery.Lora(target=target, rank=2)), scale=0.3).merge()
    merged.write(tmp_path / "hf", format="hf")
    again = cls.from_pretrained(tmp_path / "hf").eval()
    given = merged.example_inputs[1]
    with torch.no_grad():
        got, expected = again(**given).logits, merged.run(**given)["logits"]
    assert torch.equal(got, expected)


def test_a_directory_that_transformers_reads_differently_is_not_written(tmp_path, monkeypatch):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path / "base")
    program = surgery.load(f"hf:{tmp_path / 'base'}")
    written = LlamaForCausalLM.save_pretrained

    def loses(self, folder, **options):
        self.model.norm.weight = torch.nn.Parameter(self.model.norm.weight + 1)
        written(self, folder, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", loses)
    with pytest.raises(
        ExportError, match=r"transformers reads model\.norm\.weight from the directory with other values"
    ):
        program.write(tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()
