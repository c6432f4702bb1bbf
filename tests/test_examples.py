"""The examples as a user runs them, with little data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import surgery

ROOT = Path(__file__).parent.parent


def run(example: str, out: Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, "--quick", "--out", out],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        timeout=600,
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
