"""The loop: it learns, keeps the best evaluation, follows schedules, and continues after kill -9 bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.api import hookimpl
from surgery.api.programs import TrainingError, make_plugin_manager
from surgery.api.training import Objective
from surgery.train.data import read_rows, split
from surgery.train.loop import train
from surgery.train.objectives import CausalLm
from surgery.train.options import Settings
from surgery.train.registry import find_objective
from surgery.train.tokenizers import find_tokenizer
from surgery.train.watchers import read_log

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def base(llama_folder):
    return surgery.load(f"hf:{llama_folder}")


def fit(program, objective, data, folder, held_out=0.25, resume=False, watchers=(), **options):
    settings = Settings.parse({"batch": 4, "lr": 1e-2, "max_length": 32, **options})
    rows = split(read_rows([data]), held_out, settings.seed)
    return train(
        program, objective, rows, settings, folder=folder, tokenizer=find_tokenizer(program), resume=resume,
        watchers=watchers,
    )  # fmt: skip


def command(program, data, output, *more):
    code = "from surgery.cli import main; main()"
    options = ["--objective", "causal-lm", "--data", data, "-o", output, "--batch", "4", "--lr", "1e-2"]
    options += ["--max-length", "32", "--steps", "60", "--checkpoint", "5", "--evaluate", "20", *more]
    return [sys.executable, "-c", code, "train", *map(str, (program, *options))]


def test_causal_lm_learns_what_follows(base, texts, tmp_path):
    program = base.apply(surgery.Freeze(target="mlp.up"))
    frozen = {n: p.detach().clone() for n, p in program.module().named_parameters() if not p.requires_grad}
    result = fit(program, CausalLm(), texts, tmp_path / "run", epochs=6)
    # Half of the tokens follow with certainty; an untrained model is at the logarithm of 101 words, 4.6.
    assert result.before["loss"] > 4.0
    assert result.metrics["loss"] < 0.6 * result.before["loss"]
    assert frozen
    now = dict(program.module().named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in log if "lr" in row] == list(range(1, result.steps + 1))
    assert min(row["held_out"]["loss"] for row in log if "held_out" in row) == result.metrics["loss"]


def test_accumulated_steps_are_those_of_large_batches(base, texts, tmp_path):
    """The mean is over the tokens of the whole step, however it is cut: up to the order of sums in fp32."""
    ends = []
    for batch, accumulate in ((8, 1), (2, 4)):
        program = base.apply(surgery.Full())

        class InOrder(CausalLm):
            def batches(self, sizes, batch, draw):
                return [list(range(i, min(i + batch, len(sizes)))) for i in range(0, len(sizes), batch)]

        options = {"batch": batch, "accumulate": accumulate, "steps": 1, "clip": 0, "warmup": 0}
        fit(program, InOrder(), texts, tmp_path / str(batch), held_out=0.0, **options)
        ends.append(read_log(tmp_path / str(batch) / "log.jsonl")[-1]["loss"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


@pytest.mark.slow
def test_killed_and_resumed_has_the_same_weights(base, texts, tmp_path):
    """A real process, killed with kill -9 between checkpoints."""
    # Dropout, so that what is random in a step has to be drawn again.
    base.apply(surgery.Lora(target="attn.*", rank=4, dropout=0.2)).save(tmp_path / "adapted")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(output, *more):
        return subprocess.Popen(
            command(tmp_path / "adapted", texts, output, *more), env=environment, stderr=subprocess.PIPE
        )

    whole = start(tmp_path / "whole")
    assert whole.wait(240) == 0, whole.stderr.read()
    killed = start(tmp_path / "parts")
    run = tmp_path / "parts.run"
    until = time.monotonic() + 240
    while not any(row["step"] >= 12 for row in read_log(run / "log.jsonl")):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "parts").exists()
    refused = start(tmp_path / "parts", "--resume", "--seed", "1")
    assert refused.wait(240) == 2
    assert b"seed=0, and not 1" in refused.stderr.read()
    resumed = start(tmp_path / "parts", "--resume")
    assert resumed.wait(240) == 0, resumed.stderr.read()
    first, second = (load_file(tmp_path / name / "inserted.safetensors") for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [read_log(tmp_path / f"{name}.run" / "log.jsonl") for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_a_schedule_acts_and_is_in_the_log(base, texts, tmp_path):
    program = base.apply(surgery.GradualUnfreeze(every=2, unit="step"))
    fit(program, CausalLm(), texts, tmp_path / "run", steps=6)
    notes = [row for row in read_log(tmp_path / "run" / "log.jsonl") if "note" in row and row["step"]]
    assert [row["step"] for row in notes][:2] == [3, 5]
    assert "more parameters are trained" in notes[0]["note"]


def test_a_loss_that_is_not_finite_names_the_node_and_keeps_the_checkpoint(base, texts, tmp_path):
    class Breaks(CausalLm):
        def loss(self, module, batch):
            if calls.append(0) or len(calls) == 4:
                with torch.no_grad():
                    program.module().get_parameter("model.layers.1.mlp.up_proj.weight").fill_(float("nan"))
            return super().loss(module, batch)

    calls: list[int] = []
    program = base.apply(surgery.Full())
    with pytest.raises(TrainingError, match="loss is nan at step 4, rows") as caught:
        fit(program, Breaks(), texts, tmp_path / "run", steps=9, checkpoint=2)
    assert "model.layers.1.mlp.up_proj.weight is already not finite" in str(caught.value)
    assert "the checkpoint of step 2 is in " in str(caught.value)
    kept = load_file(tmp_path / "run" / "step-00000002" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_training_stops_when_it_gets_no_better_and_keeps_the_best(base, texts, tmp_path):
    program = base.apply(surgery.Full())
    options = {"lr": 0.5, "steps": 40, "evaluate": 2, "patience": 2, "warmup": 0}  # a rate that ruins it
    result = fit(program, CausalLm(), texts, tmp_path / "run", **options)
    assert result.stopped
    assert result.steps < 40
    assert result.steps == result.best + 4
    scores = [row for row in read_log(tmp_path / "run" / "log.jsonl") if "held_out" in row]
    assert result.metrics["loss"] == min(result.before["loss"], *(row["held_out"]["loss"] for row in scores))


def test_an_objective_of_a_plugin_with_a_companion(base, texts, tmp_path):
    """Towards the base's own distribution: a teacher beside the module that trains."""

    class Imitate(CausalLm):
        """Imitation."""

        name = "imitate"

        def companions(self, program):
            return {"teacher": base.module()}

        def complete(self, batch, companions):
            return {**batch, "wanted": companions["teacher"](**batch["inputs"])["logits"]}

        def loss(self, module, batch):
            return (module(**batch["inputs"])["logits"] - batch["wanted"]).square().mean()

    class Plugin:
        @hookimpl
        def surgery_objectives(self):
            return [Imitate]

    found = find_objective(make_plugin_manager(entry_points=False, plugins=(Plugin(),)), "imitate")
    assert issubclass(found.cls, Objective)
    assert found.distribution == "Plugin"
    program = base.apply(surgery.Head(labels=101), surgery.Lora(target="attn.*", rank=4))
    fit(program, found.cls(), texts, tmp_path / "run", steps=20, held_out=0.0)
    losses = [row["loss"] for row in read_log(tmp_path / "run" / "log.jsonl") if "lr" in row]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("where", ["companions", "observe"])
def test_one_that_fails_leaves_nothing_to_the_next(base, texts, tmp_path, where):
    """accelerate keeps its state, the precision too, for the whole process."""

    class Fails(CausalLm):
        """Fails."""

        name = "fails"

    def fail(*_):
        raise TrainingError("there is no teacher")

    setattr(Fails, where, fail)
    program = base.apply(surgery.Lora(target="attn.*", rank=4))
    with pytest.raises(TrainingError, match="there is no teacher"):
        fit(program, Fails(), texts, tmp_path / "a", steps=1, precision="bf16")
    assert fit(program, CausalLm(), texts, tmp_path / "b", steps=1, precision="no").steps == 1
