"""The examples as a user runs them, with little data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import yaml

import surgery
from surgery.cli import main
from tests.conftest import minilm_path

ROOT = Path(__file__).parent.parent


def run(example: str, out: Path, *more: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *more, "--quick", "--out", out],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        timeout=1800,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_film_sentiment(tmp_path):
    said = run("film_sentiment.py", tmp_path / "film")
    assert "bit for bit" in said
    rows = {row.split("│")[1].strip(): row.split("│")[2:] for row in said.splitlines() if row.count("│") > 5}
    assert set(rows) == {"linear probe", "LoRA", "LoRA, merged"}
    # The encoder's features alone beat a coin by far more than the error of 200 sentences (0.035).
    assert float(rows["linear probe"][0].strip(" %")) > 60
    base, merged = (onnx.load(tmp_path / "film" / f"{name}.onnx") for name in ("probe", "merged"))
    assert len(base.graph.node) == len(merged.graph.node)
    (entry,) = (e for e in surgery.load(str(tmp_path / "film" / "adapted")).journal if e.kind == "rewrite")
    assert len(entry.sites) == 24


@pytest.mark.slow
def test_film_yaml_from_the_base_to_onnx(tmp_path, monkeypatch, capsys):
    """The README's recipe, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((ROOT / "examples" / "film.yaml").read_text())
    recipe["train"] |= {"steps": 60, "data": "film.jsonl"}
    (tmp_path / "film.yaml").write_text(yaml.safe_dump(recipe))
    made = subprocess.run(
        [sys.executable, ROOT / "examples" / "data.py", "film", tmp_path / "all.jsonl"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert made.returncode == 0, made.stderr
    rows = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "film.jsonl").write_text("".join(rows[:1000]))
    with pytest.raises(SystemExit) as raised:
        main(["run", "film.yaml", f"hf:{minilm_path()}", "-o", "run", "--json"])
    said = capsys.readouterr()
    assert raised.value.code == 0, said.err
    found = json.loads(said.out.splitlines()[-1])
    assert found["stages"] == ["adapted", "trained", "merged", "finished"]
    # Of 200 sentences: chance is 0.5 with a standard deviation of 0.035; 60 steps are 2.4 epochs of 800.
    assert found["trained"]["metrics"]["accuracy"] > 0.61
    assert (tmp_path / "run" / "film.onnx").stat().st_size < 30e6  # 90 MB in fp32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("classification", ["accuracy", "f1"]),
        ("multi-task", ["film/accuracy", "product/accuracy", "tweets/accuracy", "editorial/accuracy"]),
        ("distill", ["agreement", "teacher/accuracy", "hints"]),
        ("contrastive", ["mrr", "Pearson with lee's ratings"]),
        ("fashion", ["precision of the ten nearest, untrained"]),
        ("tweets", ["perplexity"]),
        ("alpaca", ["loss", "perplexity"]),
    ],
)
def test_training_runs(name, said, tmp_path):
    shown = run("training_runs.py", tmp_path / "runs", name)
    assert not [part for part in said if part not in shown]


@pytest.mark.slow
def test_rl_runs(tmp_path):
    run("film_sentiment.py", tmp_path / "out" / "film")
    shown = run("rl_runs.py", tmp_path / "runs", "preferences", "ppo", "trpo", cwd=tmp_path)
    assert shown.count("KL of a token by update") == 6
    assert "trpo: reward higher by" in shown


@pytest.mark.slow
def test_smollm2_alpaca(tmp_path):
    said = run("smollm2_alpaca.py", tmp_path / "smollm2")
    assert "merged, ONNX" in said
    assert (tmp_path / "smollm2" / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
def test_smollm2_in_place(tmp_path):
    said = run("smollm2_in_place.py", tmp_path / "place")
    assert said.count("generates as before, to the token") == 2
    assert said.count("the same tokens with and without the cache") == 2
    assert "removed: the tokens of the base" in said
    assert not [word for word in ("OTHER", "DIFFERS", "CHANGED") if word in said]
    assert (tmp_path / "place" / "onnx" / "sft.onnx_adapter").is_file()
