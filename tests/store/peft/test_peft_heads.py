"""A checkpoint holds what PEFT's user does not get from the base: new heads, trained or frozen, and trained weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from torch_surgery_ia3 import IA3
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

import surgery

TOLERANCE = 1e-6  # the same ops in the same order, in most cases; over the largest logit
SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip
CLASSES = ("text-classification", AutoModelForSequenceClassification, {"num_labels": 3})
ANSWERS = ("question-answering", AutoModelForQuestionAnswering, {})
LORA = surgery.Lora(target="attn.*", rank=2)
# Model, task, passes, parts of the names of the tensors that were trained, and what the configuration says.
CASES = {
    "a frozen head": ("bert", CLASSES, [LORA, surgery.Freeze(target="head")], (), "SEQ_CLS", ["classifier"]),
    "a head of several layers": (
        "roberta", CLASSES, [LORA, surgery.Full(target="head")], ("classifier",), "SEQ_CLS", ["classifier"],
    ),
    "an adapted head": ("roberta", CLASSES, [surgery.Lora(target="attn.*,head", rank=2)], (), None, None),
    "answers": ("bert", ANSWERS, [LORA], (), "QUESTION_ANS", ["qa_outputs"]),
    "weights under the adapters": (
        "bert", CLASSES, [LORA, surgery.Full(target="attn.*")], ("query", "value.bias"), "SEQ_CLS", ["classifier"],
    ),
    "a norm": (
        "bert", CLASSES, [LORA, surgery.Full(target="path:bert.embeddings.LayerNorm.weight")],
        ("embeddings.LayerNorm",), "SEQ_CLS", ["bert.embeddings.LayerNorm", "classifier"],
    ),
    "ia3 over trained biases": (
        "bert", CLASSES, [IA3(target="attn.k,mlp.down"), surgery.Full(target="attn.k")], ("key.bias",), "SEQ_CLS",
        ["classifier"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    found = {}
    for name, model in (
        ("bert", BertModel(BertConfig(**SIZES))),
        ("roberta", RobertaModel(RobertaConfig(**SIZES))),
    ):
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", CASES)
def test_with_another_new_head(name, folders, tmp_path):
    """A user of PEFT loads the same base, which gets a new random head."""
    model, (task, auto, options), passes, trained, task_type, saved = CASES[name]
    torch.manual_seed(1)
    base = surgery.load(f"hf:{folders[model]}", task=task, model_kwargs=options)
    program = base.apply(*passes)
    program.own()
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.add_(torch.randn_like(tensor) * 0.2)
        for key, tensor in program.changed.items():
            if any(part in key for part in trained):
                tensor.add_(torch.randn_like(tensor) * 0.2)
    config = surgery.export_peft(program, tmp_path / "ours")
    assert (config["task_type"], config["modules_to_save"]) == (task_type, saved)
    given = base.example_inputs[1]
    torch.manual_seed(77)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fresh = auto.from_pretrained(folders[model], **options)
        theirs = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    assert not [w for w in said if "missing" in str(w.message)]
    again = surgery.import_peft(tmp_path / "ours", base)
    with torch.no_grad():
        got, expected, back = dict(theirs(**given)), program.run(**given), again.run(**given)
    for key, value in expected.items():
        for other in (got, back):
            assert float((other[key] - value).abs().max()) <= TOLERANCE * float(value.abs().max()), key
