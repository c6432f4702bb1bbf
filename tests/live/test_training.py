"""transformers' Trainer and TRL's trainers, unchanged, on an adapted live model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import surgery


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(
        output_dir=str(tmp_path / "runs"), max_steps=12, per_device_train_batch_size=4, learning_rate=2e-2,
        report_to=[], logging_steps=1, save_steps=6, use_cpu=True, seed=0, disable_tqdm=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, dataloader_pin_memory=False,
    )  # fmt: skip


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (16, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trained_checkpointed_and_loaded(llama, ids, arguments, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    program = surgery.apply_(model, surgery.Lora(target="attn.*", rank=4))
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    model.eval()
    trained = model(ids).logits
    mask = torch.ones_like(ids)
    assert torch.equal(program.run(input_ids=ids, attention_mask=mask)["logits"], trained)

    # A checkpoint of the Trainer's goes on where it stopped: into a fresh model with the same surgery.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    surgery.apply_(again, surgery.Lora(target="attn.*", rank=4))
    resumed = Trainer(model=again, args=arguments, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-6"))
    again.eval()
    assert torch.equal(again(ids).logits, trained)

    surgery.save_(model, tmp_path / "adapted")
    graph = surgery.load(str(tmp_path / "adapted"))
    assert torch.equal(graph.run(input_ids=ids, attention_mask=mask)["logits"], trained)
    given = {"max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(ids, **given)
    from surgery.store.hf import write_hf

    write_hf(graph.merge(), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.use_cache
    assert torch.equal(plain.generate(ids, **given), tokens)


# -- TRL

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "the", "film", "good", "bad", "it", "was"]


@pytest.fixture
def reader():
    """A tokenizer of a dozen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_trl(method, llama, reader, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    llama.save_pretrained(tmp_path / "base")
    reader.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    program = surgery.apply_(model, surgery.Lora(target="attn.*", rank=4))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    row = {"prompt": "what is the film"}
    row |= (
        {"completion": " it was good"}
        if method == "sft"
        else {"chosen": " it was good", "rejected": " it was bad"}
    )
    config, trainer = (SFTConfig, SFTTrainer) if method == "sft" else (DPOConfig, DPOTrainer)
    arguments = config(
        output_dir=str(tmp_path / "runs"), max_steps=6, per_device_train_batch_size=4, learning_rate=2e-2, report_to=[],
        logging_steps=1, use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    run = trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list([row] * 8), processing_class=reader
    )
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(program.tensors)
    surgery.remove_(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
