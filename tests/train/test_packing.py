"""Packing: a row of several examples gives the same results as each example alone, or is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

import surgery
from surgery.api.programs import TrainingError
from surgery.train.objectives import CausalLm, Sft
from surgery.train.runner import Body
from surgery.train.watchers import read_log
from tests.train.conftest import prepared, write
from tests.train.test_loop import fit


@pytest.fixture(scope="module")
def base(llama_folder):
    return surgery.load(f"hf:{llama_folder}")


@pytest.fixture
def adapted(base):
    return with_lora(base)


def with_lora(base):
    program = base.apply(surgery.Lora(target="attn.*,mlp.*", rank=2))
    torch.manual_seed(1)
    for tensor in program.tensors.values():
        tensor.data.normal_(std=0.3)
    return program


def batch_of(program, objective, data, count=5):
    examples, setting = prepared(program, objective, data)
    return objective.collate(examples[range(count)], setting, torch.Generator())


@pytest.fixture
def dialogues(tmp_path):
    rows = [
        {"prompt": "what is it" + " and" * (i % 4), "response": "a red cat" + " yes" * (i % 3)}
        for i in range(24)
    ]
    return write(tmp_path / "dialogues.jsonl", rows)


@pytest.mark.parametrize("kind", [CausalLm, Sft])
def test_the_loss_and_gradients_of_rows(kind, adapted, texts, dialogues):
    data = texts if kind is CausalLm else dialogues
    model, found = Body(adapted).model.eval(), []
    for objective in (kind(), kind(packing=True)):
        batch = batch_of(adapted, objective, data)
        loss = objective.loss(model, batch)
        model.zero_grad()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((objective.terms(batch), loss.detach(), gradient))
    (terms, loss, gradient), (packed_terms, packed_loss, packed_gradient) = found
    assert batch["inputs"]["input_ids"].shape[0] == 1
    assert terms == packed_terms
    # fp32: softmax over one long row with most of it at -inf, in the place of short ones.
    torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_gradient, gradient, atol=1e-5, rtol=1e-4)


def test_an_example_does_not_see_another(adapted, texts):
    objective = CausalLm(packing=True)
    model, batch = Body(adapted).model.eval(), batch_of(adapted, objective, texts)
    ids, positions = batch["inputs"]["input_ids"], batch["inputs"]["position_ids"][0]
    start = int((positions == 0).nonzero()[1])
    with torch.no_grad():
        before = model(**batch["inputs"]).logits[0, start:]
        ids[0, :start] = ids[0, :start].flip(0)
        assert torch.equal(model(**batch["inputs"]).logits[0, start:], before)


def test_it_trains_as_without(base, texts, tmp_path):
    found = []
    for packing in (False, True):
        folder = tmp_path / str(packing)
        fit(with_lora(base), CausalLm(packing=packing), texts, folder, steps=5)
        found.append([row for row in read_log(folder / "log.jsonl") if "loss" in row and "tokens" in row])
    padded, packed = ([row["loss"] for row in rows] for rows in found)
    assert padded == pytest.approx(packed, abs=1e-4)  # five steps of Adam on what differs by 1e-6
    assert len(padded) == 5
    assert [row["tokens"] for row in found[0]] == [row["tokens"] for row in found[1]]


def test_the_graph_is_refused(adapted, texts, tmp_path):
    with pytest.raises(TrainingError, match="causal-lm --packing needs the live transformers model"):
        fit(adapted, CausalLm(packing=True), texts, tmp_path / "run", steps=2, form="graph")


def test_a_loss_that_is_no_number_is_looked_for_in_rows(adapted, texts, tmp_path, monkeypatch):
    real = CausalLm.loss
    monkeypatch.setattr(CausalLm, "loss", lambda self, *given: real(self, *given) * float("nan"))
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 1, rows .*every node of the graph is finite"
    ):
        fit(adapted, CausalLm(packing=True), texts, tmp_path / "run", steps=2)


@pytest.mark.parametrize(
    "model",
    [
        BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)),
        MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)),
    ],
    ids=["bloom", "mamba"],
)
def test_models_that_mix_examples_are_refused(model, adapted, texts):
    """One has no positions but distances over the whole row, the other carries a state along it."""
    objective = CausalLm(packing=True)
    batch = batch_of(adapted, objective, texts)
    with pytest.raises(TrainingError, match=r"causal-lm --packing: .*; leave it out"):
        objective.check(model.eval(), batch, "live")
