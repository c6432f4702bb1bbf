"""modules_to_save on a base with tied weights: PEFT copies the module, so that only its own use changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import surgery
from tests.shared import tiny

TOLERANCE, MERGED = 1e-5, 2e-4  # over the largest logit; a merged weight is rounded once more
GIVEN = {"input_ids": torch.arange(14).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    config = tiny.llama()
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(module):
    with torch.no_grad():
        return module(**GIVEN).logits


def agree(got, expected, allowed=TOLERANCE):
    assert float((got - expected).abs().max()) <= allowed * float(expected.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    ],
    ids=str,
)
def test_both_ways(options, folder, tmp_path):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(model(folder), LoraConfig(r=2, target_modules=["q_proj"], **options)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs)
    base = surgery.load(f"hf:{folder}")
    program = surgery.import_peft(tmp_path / "theirs", base)
    agree(program.run(**GIVEN)["logits"], expected)
    surgery.export_peft(program, tmp_path / "ours")
    agree(logits(PeftModel.from_pretrained(model(folder), tmp_path / "ours").eval()), expected)
    merged = program.merge()
    agree(merged.run(**GIVEN)["logits"], expected, MERGED)
    merged.write(tmp_path / "hf", format="hf")
    agree(logits(model(tmp_path / "hf")), expected, MERGED)
    assert torch.equal(program.undo_all().run(**GIVEN)["logits"], base.run(**GIVEN)["logits"])
