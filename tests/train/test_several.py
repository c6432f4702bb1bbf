"""surgery train in two processes on gloo, replicated (DDP) and fully sharded (FSDP2), against one process."""

from __future__ import annotations

import json
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
from surgery.train.watchers import read_log

ROOT = Path(__file__).parent.parent.parent
# fp32: a mean over two processes in the place of a sum over two batches, through steps of Adam, whose first ones are
# the sign of a gradient.
TOLERANCE = 1e-5
RUNS = {
    "alone": ("--accumulate", "2"),
    "ddp": (),
    "launched": ("--accumulate", "2"),
    "fsdp2": (),
    "graph alone": ("--accumulate", "2", "--form", "graph"),
    "graph ddp": ("--form", "graph"),
    "graph fsdp2": ("--form", "graph"),
}
SHARDS = {"fsdp2": ("--shard", "LlamaDecoderLayer"), "graph fsdp2": ("--shard", "Unit")}
SLOW = pytest.mark.slow


def start(mode, program, data, output, *more):
    """Start the processes of a run.

    With 11 batches in an epoch, the last step of two processes has one batch, and so has the second evaluation.
    """
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    if mode == "launched":  # accelerate starts several on CPUs by mpirun alone
        several = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    line = [
        sys.executable, *(several if "alone" not in mode else ()), "-m",
        "surgery" if mode == "launched" else "tests.train.several", *SHARDS.get(mode, ()),
        "train", program, "-o", output, "--objective", "causal-lm", "--data", data,
        "--batch", "4", "--lr", "1e-2", "--max-length", "32", "--steps", "12", "--held-out", "0.1",
        *RUNS[mode], *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, line)), env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )


def finish(process):
    said, failed = process.communicate(timeout=300)
    assert process.returncode == 0, failed.decode()[-3000:]
    return said.decode()


@pytest.fixture(scope="module")
def adapted(llama_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    program = surgery.load(f"hf:{llama_folder}").apply(
        surgery.Lora(target="attn.*", rank=4), surgery.Full(target="input_layernorm")
    )
    generator = torch.Generator().manual_seed(1)
    for tensor in program.tensors.values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    program.save(folder / "adapted")
    lines = [
        {"text": f"the {['cat', 'dog'][i % 2]} sees a red tree" + " and says yes" * (i % 3)}
        for i in range(48)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def of(adapted, mode, ran={}):  # noqa: B006 - one run of each mode in a session
    if mode not in ran:
        output = adapted / mode
        finish(start(mode, adapted / "adapted", adapted / "texts.jsonl", output))
        ran[mode] = (
            read_log(output.with_name(f"{mode}.run") / "log.jsonl"),
            load_file(output / "inserted.safetensors"),
        )
    return ran[mode]


@pytest.mark.parametrize(
    "mode",
    [
        "ddp",
        "fsdp2",
        pytest.param("launched", marks=SLOW),
        pytest.param("graph ddp", marks=SLOW),
        pytest.param("graph fsdp2", marks=SLOW),
    ],
)
def test_the_losses_of_one_process(adapted, mode):
    alone, trained = of(adapted, "graph alone" if "graph" in mode else "alone")
    several, other = of(adapted, mode)
    losses = [[row["loss"] for row in log if "loss" in row] for log in (alone, several)]
    assert len(losses[0]) == 12
    assert losses[0][-1] < losses[0][0] - 0.3
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= TOLERANCE
    tokens = [[row["tokens"] for row in log if "tokens" in row] for log in (alone, several)]
    assert tokens[0] == tokens[1]  # no batch is counted twice
    held = [[row["held_out"]["loss"] for row in log if "held_out" in row] for log in (alone, several)]
    assert held[0] == pytest.approx(held[1], abs=TOLERANCE)
    for name, tensor in trained.items():
        # Adam moves a value by up to lr a step, whatever its gradient's size: one near zero may turn.
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=SLOW), "fsdp2"])
def test_killed_and_resumed_has_the_same_weights(adapted, mode):
    """kill -9 of all its processes in mid-epoch; on the same number of processes it is the same to the bit."""
    options = ("--checkpoint", "2", "--evaluate", "100")
    program, data = adapted / "adapted", adapted / "texts.jsonl"
    finish(start(mode, program, data, adapted / f"{mode} whole", *options))
    output = adapted / f"{mode} parts"
    run = output.with_name(f"{output.name}.run")
    killed = start(mode, program, data, output, *options)
    until = time.monotonic() + 240
    while not any(row["step"] >= 5 for row in read_log(run / "log.jsonl")):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.002)
    for child in (*_children(killed.pid), killed.pid):
        os.kill(child, signal.SIGKILL)
    killed.wait()
    assert not output.exists()
    finish(start(mode, program, data, output, *options, "--resume"))
    first, second = (
        load_file(adapted / f"{mode} {name}" / "inserted.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_what_needs_whole_parameters_is_refused(adapted):
    failed = start(
        "fsdp2",
        adapted / "adapted",
        adapted / "texts.jsonl",
        adapted / "refused",
        "--regularize",
        "l1=1e-4@attn.*",
    )
    _, said = failed.communicate(timeout=300)
    assert failed.returncode != 0
    assert "--regularize needs whole parameters" in said.decode()
    assert not (adapted / "refused").exists()
