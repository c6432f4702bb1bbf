"""Form of the trained model: transformers models train live by default, with the graph's losses; mixed precision."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.api.programs import TrainingError
from surgery.train.objectives import CausalLm
from surgery.train.runner import Body
from surgery.train.watchers import read_log
from tests.shared.models import convnet
from tests.train.test_loop import fit


@pytest.fixture(scope="module")
def base(llama_folder):
    return surgery.load(f"hf:{llama_folder}")


def losses(folder):
    return [row["loss"] for row in read_log(folder / "log.jsonl") if "loss" in row]


def test_live_and_graph_have_the_same_losses(base, texts, tmp_path):
    """fp32: the same sums in another order, through eight steps of Adam."""
    found = {}
    for form in ("auto", "graph"):
        program = base.apply(
            surgery.Lora(target="attn.*", rank=4), surgery.GradualUnfreeze(every=3, unit="step")
        )
        generator = torch.Generator().manual_seed(1)
        for tensor in program.tensors.values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        result = fit(program, CausalLm(), texts, tmp_path / form, steps=8, form=form)
        assert result.metrics["loss"] < result.before["loss"]
        log = read_log(tmp_path / form / "log.jsonl")
        found[form] = losses(tmp_path / form), [row for row in log if "note" in row], program.run()["logits"]
    assert Body(program).form == "live"
    assert found["auto"][0] == pytest.approx(found["graph"][0], abs=1e-4)
    assert found["auto"][1] == found["graph"][1] != []  # the schedule acted at the same steps
    torch.testing.assert_close(found["auto"][2], found["graph"][2], atol=1e-3, rtol=1e-3)


def test_what_no_live_model_holds_trains_as_the_graph_and_says_so(base, texts, tmp_path):
    head = surgery.Head(mode="add", labels=1, head_name="value", pool="none")
    with pytest.raises(TrainingError, match="no trainable parameter affects the loss of causal-lm"):
        fit(base.apply(head), CausalLm(), texts, tmp_path / "head", steps=1)
    program = base.apply(surgery.Lora(target="attn.*", rank=4), head)
    fit(program, CausalLm(), texts, tmp_path / "run", steps=1)
    notes = [row["note"] for row in read_log(tmp_path / "run" / "log.jsonl") if "note" in row]
    assert any("trains as its graph, because head changes more than single layers" in note for note in notes)
    with pytest.raises(TrainingError, match="--form live: head changes more"):
        Body(program, "live")
    with pytest.raises(TrainingError, match="gradient checkpointing needs the live transformers model"):
        Body(program, checkpointing=True)


def test_statistics_that_move_in_training_stay_the_program_s_own():
    model, inputs = convnet()
    program = surgery.capture(model, inputs).apply(surgery.Full())
    assert Body(program).form == "graph"
    with pytest.raises(TrainingError, match="running statistics of a BatchNorm2d"):
        Body(program, "live")


def test_checkpointed_layers_run_twice_to_the_same_losses(base, texts, tmp_path, monkeypatch):
    counted, found = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        program = base.apply(surgery.Lora(target="attn.*", rank=4))
        inner = []
        kind = type(program.base.loaded.module.model.layers[0].mlp)
        monkeypatch.setattr(kind, "forward", _counting(kind.forward, inner))
        fit(program, CausalLm(), texts, tmp_path / str(checkpointing), steps=3, held_out=0.0,
            checkpointing=checkpointing)  # fmt: skip
        monkeypatch.undo()
        counted.append(len(inner))
        found.append(losses(tmp_path / str(checkpointing)))
    assert counted[1] == 2 * counted[0] > 0
    assert found[0] == found[1]


def _counting(forward, calls):
    def counted(self, *args, **kwargs):
        if self.training:
            calls.append(1)
        return forward(self, *args, **kwargs)

    return counted


def test_bf16_learns_and_leaves_the_program_as_it_was(base, texts, tmp_path):
    program = base.apply(surgery.Full())
    result = fit(program, CausalLm(), texts, tmp_path / "run", epochs=4, precision="bf16")
    assert result.metrics["loss"] < 0.8 * result.before["loss"]
    assert {p.dtype for p in program.module().parameters()} == {torch.float32}
    ids = torch.tensor([[1, 7, 8, 10]])
    logits = program.module()(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert logits.dtype == torch.float32
    # autocast that stayed on would round to bf16, 2**-8
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU, which has fp16")
def test_fp16_is_refused_on_a_cpu(base, texts, tmp_path):
    with pytest.raises(TrainingError, match="needs a GPU; on a CPU use --precision bf16"):
        fit(base.apply(surgery.Full()), CausalLm(), texts, tmp_path / "run", precision="fp16")
    fit(base.apply(surgery.Full()), CausalLm(), texts, tmp_path / "run", precision="bf16", steps=1)
