"""Benchmarks run, compare like with like and write their results; no test checks a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.slow  # two minutes: every benchmark, in small


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, text=True, capture_output=True, timeout=240)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks") / "benchmarks.json"
    done = run("--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@SLOW
def test_every_benchmark_gives_ratios(quick):
    shown, found = quick
    assert found["quick"]
    rows = found["rows"]
    assert {row["benchmark"] for row in rows} == {
        "match", "step", "in_place", "merge", "onnx_latency", "generation", "startup",
    }  # fmt: skip
    peers = {(row["benchmark"], row["peer_name"]) for row in rows if row["ratio"] is not None}
    assert peers >= {
        ("match", "fx.replace_pattern"),
        ("match", "onnxscript"),
        ("step", "PEFT"),
        ("step", "frozen base"),
        ("merge", "floor"),
        ("merge", "PEFT"),
        ("onnx_latency", "base"),
        ("in_place", "PEFT"),
        ("generation", "eager"),
        ("startup", "import click, rich"),
    }
    for row in rows:
        if row["ratio"] is not None and row["what"] != "MiniLM: added by LoRA":
            assert (
                0 < row["low"] <= row["ratio"] <= row["high"] if row["low"] is not None else row["ratio"] > 0
            )
        assert (row["met"] is None) == (row["aim"] is None)
    assert "MiniLM: LoRA step" in shown


@SLOW
def test_losses_agree_and_a_merge_adds_no_node(quick):
    rows = {(row["what"], row["peer_name"]): row for row in quick[1]["rows"]}
    assert "losses agree" in rows["MiniLM: LoRA step", "PEFT"]["note"]
    nodes = rows["MiniLM: nodes of merged ONNX", "base"]
    assert nodes["ours"] == nodes["peer"]


@SLOW
def test_training_compares_the_same_losses(tmp_path):
    out = tmp_path / "training.json"
    done = run("training", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    same, own = json.loads(out.read_text())["rows"]
    assert same["peer_name"] == own["peer_name"] == "PEFT and Trainer"
    assert same["note"].startswith("losses of 3 steps agree within")
    assert "8 examples; held-out loss" in own["note"]


def test_an_unknown_name_is_one_line():
    done = run("mtach")
    assert done.returncode == 2
    assert "no benchmark 'mtach'" in done.stderr.splitlines()[-1]
