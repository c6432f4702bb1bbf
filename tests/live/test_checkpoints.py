"""`save_pretrained` of a live model, as a Trainer calls it, and `save_` of a model that was resized."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import surgery
from surgery.common.errors import LoadError, PassError
from tests.live.conftest import fill, small

PASSES = {
    "dora": [surgery.Lora(target="attn.*", rank=2, dora=True)],
    "int4 and lora": [
        surgery.Quantize(target="mlp.*", format="int4"),
        surgery.Lora(target="attn.*", rank=2),
    ],
}


@pytest.fixture
def base(tmp_path):
    """A directory with the base, and a function that loads it."""
    small().save_pretrained(tmp_path / "base")
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()


def outputs(program, ids):
    return program.run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]


@pytest.mark.parametrize("name", PASSES)
def test_a_checkpoint_is_not_taken_for_the_base(name, base, ids, tmp_path):
    model = base()
    surgery.apply_(model, *PASSES[name])
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"), max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps",
        load_best_model_at_end=True, per_device_train_batch_size=2, learning_rate=2e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()  # at the end it loads the best checkpoint
    model.eval()
    folder = trainer.state.best_model_checkpoint
    with torch.no_grad():
        trained = model(ids).logits
    for cls in (AutoModelForCausalLM, type(model)):
        with pytest.raises(ValueError, match=r"surgery\.load_\(model, DIR\).*surgery merge DIR"):
            cls.from_pretrained(folder)
    graph = surgery.load(folder)
    assert torch.equal(outputs(graph, ids), trained)
    other = base()
    surgery.load_(other, folder)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, trained)
    # The base's weights are in its own directory.
    assert set(load_file(f"{folder}/model.safetensors")) == set(surgery.program_of(model).tensors)
    again = base()
    surgery.apply_(again, *PASSES[name])
    again.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trained)


def test_what_from_pretrained_reads_is_written_as_before(base, ids, tmp_path):
    model = base()
    surgery.apply_(model, surgery.Full())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=2))
    fill(model)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "adapted")
    model.save_pretrained(tmp_path / "adapted")  # again: it is a directory of ours
    assert surgery.load(str(tmp_path / "adapted")).journal.find("lora")
    surgery.merge_(model)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(PassError, match=r"holds a transformers model.*surgery\.save_"):
        copied.save_pretrained(tmp_path / "merged")
    surgery.remove_(copied, "lora")
    copied.save_pretrained(tmp_path / "full")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(again(ids).logits, copied(ids).logits)
    surgery.remove_(copied)
    assert "save_pretrained" not in vars(copied)


def test_values_of_a_gathered_state_dict(base, ids, tmp_path):
    model = base()
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=2))
    values = {name: tensor + 0.1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "there", state_dict=values)
    with torch.no_grad():
        for name, tensor in surgery.program_of(model).tensors.items():
            tensor.copy_(values[name])
    assert torch.equal(outputs(surgery.load(str(tmp_path / "there")), ids), model(ids).logits)


@pytest.mark.parametrize("when", ["before", "after"])
def test_saved_after_new_tokens(when, base, ids, tmp_path):
    model = base()
    if when == "before":
        model.resize_token_embeddings(110)
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=2))
    if when == "after":
        model.resize_token_embeddings(110)
    fill(model)
    ids = torch.cat([ids, torch.full_like(ids[:, :1], 108)], 1)
    logits = model(ids).logits
    assert logits.shape[-1] == 110
    assert torch.equal(outputs(surgery.program_of(model), ids), logits)
    surgery.save_(model, tmp_path / "saved")
    assert torch.equal(outputs(surgery.load(str(tmp_path / "saved")), ids), logits)
    with pytest.raises(LoadError, match=r"is another model.*leave out ref to include the base"):
        surgery.save_(model, tmp_path / "other", ref=f"hf:{tmp_path / 'base'}")
    assert not (tmp_path / "other").exists()
    surgery.save_(model, tmp_path / "merged", format="hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # A merge rounds every weight once more.
    assert float((merged(ids).logits - logits).abs().max()) <= 2e-4 * float(logits.abs().max())
    surgery.remove_(model)
    assert model(ids).logits.shape[-1] == 110


def test_new_tokens_under_an_adapter_of_the_table(base):
    model = base()
    surgery.apply_(model, surgery.Lora(target="embed.token", rank=2))
    model.resize_token_embeddings(110)
    with pytest.raises(PassError, match=r"embed_tokens.*undo .* first.*remove_"):
        surgery.program_of(model)
