"""The whole chain on a tiny model of each family, with the same outputs throughout.

The model is adapted live, generates, trains, is saved, loaded as a graph, merged, written as a transformers directory,
and opened by `from_pretrained`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import surgery
from surgery.cli import main
from surgery.engine.contract.observe import observe
from tests.zoo import zoo
from tests.zoo.live import tensors

# A merge rounds every weight once more: surgery.engine.change.merge argues for it.
MERGED = 2e-4
GENERATE = ("t5", "whisper", "mixtral", "qwen3", "gemma")


class Summed(Trainer):
    """Gives a model without its own loss one: the mean square of its outputs."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.get("loss")
        if loss is None:
            loss = sum(t.float().square().mean() for t in tensors(outputs))
        return (loss, outputs) if return_outputs else loss


def trained(model: nn.Module, inputs: dict, folder) -> list[float]:
    """Losses of a few steps of transformers' Trainer on the rows of one batch."""
    rows = [{name: value[i % len(value)] for name, value in inputs.items()} for i in range(8)]
    said = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if said in inputs and "pixel_values" not in inputs:
        rows = [{**row, "labels": row[said]} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True, dataloader_pin_memory=False,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Summed(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    model.eval()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def run(*line: object) -> None:
    with pytest.raises(SystemExit) as raised:
        main([str(part) for part in line])
    assert raised.value.code == 0


def generated(model, inputs: dict, **more):
    given = {key: inputs[key] for key in ("input_ids", "input_features") if key in inputs}
    return model.generate(**given, max_new_tokens=8, do_sample=False, **more)


@pytest.mark.parametrize("name", ["t5", "whisper", "mixtral", "qwen3", "gemma", "vit", "clip"])
def test_chain(name, randomised, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DISABLED", "true")
    zoo.module(name).save_pretrained(tmp_path / "base")
    inputs = {k: v for k, v in zoo.build(name).kwargs.items() if isinstance(v, torch.Tensor)}
    cls = type(zoo.module(name))
    model = cls.from_pretrained(tmp_path / "base").eval()
    assert isinstance(model, cls)

    def outputs(of):
        with torch.no_grad():
            return tensors(of(**inputs))

    before = outputs(model)
    surgery.apply_(model, surgery.Lora(target="attn.*", rank=4), example=zoo.ARCHITECTURES[name].example)
    assert observe(before, outputs(model)).equal
    randomised(model, std=0.1)
    if name in GENERATE:
        cached, plain = (generated(model, inputs, use_cache=on) for on in (True, False))
        assert torch.equal(cached, plain)
    losses = trained(model, inputs, tmp_path / "runs")
    assert losses[-1] < losses[0]
    assert type(model) is cls
    logits = outputs(model)
    assert not observe(before, logits).equal
    tokens = generated(model, inputs) if name in GENERATE else None

    surgery.save_(model, tmp_path / "adapted")
    graph = surgery.load(str(tmp_path / "adapted"))
    # Experts are batched in the graph and dispatched in the model: sums in another order.
    assert observe(logits, tensors(graph.run(**inputs))).difference <= (1e-5 if name == "mixtral" else 0)
    run("merge", tmp_path / "adapted", "--format", "hf", "-o", tmp_path / "merged")
    merged = cls.from_pretrained(tmp_path / "merged").eval()
    assert observe(logits, outputs(merged)).difference <= MERGED
    if tokens is not None:
        assert torch.equal(generated(merged, inputs), tokens)
    surgery.remove_(model)
    assert observe(before, outputs(model)).equal
