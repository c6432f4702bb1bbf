"""Experiment trackers get the figures of the log, by step. MLflow, Trackio and W&B: where they are installed."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

import surgery
from surgery.api.programs import TrainingError
from surgery.cli import main
from surgery.train.data import read_rows, split
from surgery.train.loop import train
from surgery.train.objectives import CausalLm
from surgery.train.options import Settings
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tracking import TRACKERS, Tracked, check_tracker
from surgery.train.watchers import read_log


@pytest.fixture(scope="module")
def base(llama_folder):
    return surgery.load(f"hf:{llama_folder}")


def fit(base, texts, folder, *names):
    """Train four steps with trackers. Returns the figures of the log: (step, loss) of steps and of evaluations."""
    program = base.apply(surgery.Lora(target="attn.*", rank=4))
    facts = {"objective": "causal-lm", "data": [str(texts)], "batch": 4}
    train(
        program,
        CausalLm(),
        split(read_rows([texts]), 0.25, 0),
        Settings(batch=4, steps=4, evaluate=2, max_length=32),
        folder=folder / "run",
        tokenizer=find_tokenizer(program),
        watchers=[Tracked(name, folder / name, "first", facts) for name in names],
    )
    log = read_log(folder / "run" / "log.jsonl")
    return (
        [(row["step"], row["loss"], row["lr"]) for row in log if "lr" in row],
        [(row["step"], row["held_out"]["loss"]) for row in log if "held_out" in row],
    )


def test_tensorboard(base, texts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps, held = fit(base, texts, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()

    def read(name):
        return [(event.step, event.value) for event in events.Scalars(name)]

    near = {"rel": 1e-6}  # TensorBoard has fp32
    assert [s for s, _ in read("train/loss")] == [s for s, *_ in steps] == [1, 2, 3, 4]
    assert [v for _, v in read("train/loss")] == pytest.approx([loss for _, loss, _ in steps], **near)
    assert [v for _, v in read("train/lr")] == pytest.approx([rate for *_, rate in steps], **near)
    assert [s for s, _ in read("held_out/loss")] == [2, 4]
    assert [v for _, v in read("held_out/loss")] == pytest.approx([loss for _, loss in held], **near)
    assert "notes/text_summary" in events.Tags()["tensors"]


def test_mlflow(base, texts, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    steps, held = fit(base, texts, tmp_path, "mlflow")
    client = mlflow.tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'surgery'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params["objective"] == "causal-lm"
    found = {n: client.get_metric_history(run.info.run_id, n) for n in ("train/loss", "held_out/loss")}
    assert [(m.step, m.value) for m in found["train/loss"]] == [(step, loss) for step, loss, _ in steps]
    assert [(m.step, m.value) for m in found["held_out/loss"]] == held


def test_wandb_offline(base, texts, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    fit(base, texts, tmp_path, "wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"held_out/loss" in file.read_bytes()


def test_trackio(base, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio-files"))
    pytest.importorskip("trackio")
    import sqlite3

    fit(base, texts, tmp_path, "trackio")
    (file,) = (tmp_path / "trackio-files").glob("*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics").fetchall()
    seen = {step for step, metrics in rows if b"held_out/loss" in _bytes(metrics)}
    assert seen == {2, 4}


def _bytes(value):
    return value.encode() if isinstance(value, str) else bytes(value)


def test_trackers_that_are_absent_or_unknown(monkeypatch, tmp_path, texts):
    with pytest.raises(TrainingError, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_tracker("tensorbord")
    monkeypatch.setattr("surgery.train.tracking.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(TrainingError, match=f"which is not installed; pip install {name}$"):
            check_tracker(name)
    # On the command line: one line, before the model, which does not exist either, is loaded.
    err = io.StringIO()
    line = [
        "train",
        "hf:nowhere",
        "--objective",
        "causal-lm",
        "--data",
        str(texts),
        "-o",
        str(tmp_path / "out"),
    ]
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([*line, "--track", "mlflow"])
    assert stopped.value.code == 2
    assert "--track mlflow needs the package mlflow" in err.getvalue()
    assert list(tmp_path.glob("out*")) == []


def test_a_tracker_that_cannot_start_leaves_one_line(base, texts, tmp_path, monkeypatch):
    def fail(self):
        raise ValueError("no server answers\nat all")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", fail)
    with pytest.raises(TrainingError, match=r"^--track tensorboard cannot start: no server answers$"):
        fit(base, texts, tmp_path, "tensorboard")


def test_on_the_command_line(llama_folder, texts, tmp_path):
    out = io.StringIO()
    line = ["train", f"hf:{llama_folder}", "--objective", "causal-lm", "--data", str(texts), "--steps", "1"]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(SystemExit) as stopped,
    ):
        main(
            [
                *line,
                "--track",
                "tensorboard",
                "--tensorboard",
                "--json",
                "--quiet",
                "-o",
                str(tmp_path / "out"),
            ]
        )
    assert not stopped.value.code, out.getvalue()
    assert json.loads(out.getvalue())["steps"] == 1
    assert len(list((tmp_path / "out.run" / "tensorboard").glob("events.*"))) == 1
