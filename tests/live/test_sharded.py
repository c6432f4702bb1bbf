"""accelerate with an adapted model in two processes, replicated (DDP) and sharded (FSDP2), against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

import surgery
from tests.shared import tiny

pytestmark = pytest.mark.slow  # the quick suite has two processes in tests/train/test_several.py
# fp32: the mean over two halves of a batch in the place of the mean over the whole, through six steps of Adam, whose
# first steps are the sign of a gradient.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """mode -> what the run printed, and the directory that it saved."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(folder / "base")
    found = {}
    for mode in ("alone", "ddp", "fsdp2"):
        several = (
            []
            if mode == "alone"
            else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        )
        line = [sys.executable, *several, "-m", "tests.live.sharded", mode, str(folder / mode)]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (said,) = (row for row in done.stdout.splitlines() if row.startswith("{"))
        found[mode] = json.loads(said), folder / mode
    return found


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_the_losses_of_one_process(runs, mode):
    alone, several = runs["alone"][0]["losses"], runs[mode][0]["losses"]
    assert len(alone) == 6
    assert alone[-1] < alone[0] - 0.05
    assert max(abs(a - b) for a, b in zip(alone, several, strict=True)) <= TOLERANCE
    assert (runs[mode][0]["shards"] > 0) == (mode == "fsdp2")


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_what_was_trained_is_saved(runs, mode):
    """Adapters and norms are gathered from both processes."""
    alone, several = (surgery.load(str(runs[m][1])) for m in ("alone", mode))
    before = surgery.load(str(runs["alone"][1].parent / "alone")).undo_all()
    assert set(alone.tensors) == set(several.tensors)
    assert any("norm" in name for name in alone.changed)
    for name, tensor in {**alone.tensors, **alone.changed}.items():
        own = {**several.tensors, **several.changed}[name]
        # Adam moves a value by up to lr a step, whatever its gradient's size: one near zero may turn.
        torch.testing.assert_close(own, tensor, rtol=1e-3, atol=1e-3)
    moved = [n for n, t in several.changed.items() if not torch.equal(t, before.base.tensors[n])]
    assert moved
    logits = [program.run()["logits"] for program in (alone, several)]
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-3 * float(logits[0].abs().max())


def test_a_sharded_model_is_not_changed(runs):
    assert "before it is sharded" in runs["fsdp2"][0]["refused"]
