"""Latency of MiniLM's ONNX files in onnxruntime.

The merged file is compared with the base's: it should have as many nodes and be as fast. The adapted file is compared
with the base's too, and the base's with the file that torch.onnx alone writes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import surgery
from benchmarks.models import minilm, randomise, require, torch_onnx
from benchmarks.timing import Row, Variant, compare, measure
from surgery.capture import fresh_inputs
from surgery.export.runtime import OnnxModel

AIM = 1.05


def run(quick: bool) -> Iterator[Row]:
    require("onnxruntime", "the benchmark of ONNX files")
    base = minilm().program()
    adapted = randomise(base.apply(surgery.Lora(target="attn.*", rank=8), verify=False))
    _, inputs = fresh_inputs(base.base.captured, {"batch": 4, "seq": 48})
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        programs = {"base": base, "merged": adapted.merge()}
        if not quick:  # Exports take most of this benchmark's time.
            programs["adapted"] = adapted
        for name, program in programs.items():
            program.export(Path(folder, f"{name}.onnx"))
            files[name] = OnnxModel(Path(folder, f"{name}.onnx"), threads=torch.get_num_threads())
        if not quick:
            path, module = Path(folder, "torch.onnx"), base.base.loaded.module
            torch_onnx(base, module, path, input_names=list(base.example_inputs[1]))
            files["torch.onnx"] = OnnxModel(path, threads=torch.get_num_threads())
        counts = {name: len(file.nodes) for name, file in files.items()}
        times = measure(
            {name: Variant(lambda _, file=file: file.run(inputs)) for name, file in files.items()},
            rounds=5 if quick else 60,
            warmup=2,
        )
    note = f"{counts['merged']} nodes against {counts['base']}"
    ratio = counts["merged"] / counts["base"]
    yield Row(
        "onnx_latency",
        "MiniLM: nodes of merged ONNX",
        "base",
        counts["merged"],
        counts["base"],
        ratio,
        aim=1,
        unit=" ",
    )
    yield compare("onnx_latency", "MiniLM: merged ONNX", times, "merged", "base", AIM, note)
    if not quick:
        note = f"{counts['adapted']} nodes against {counts['base']}"
        yield compare("onnx_latency", "MiniLM: adapted ONNX", times, "adapted", "base", None, note)
        note = f"{counts['base']} nodes against {counts['torch.onnx']}"
        yield compare("onnx_latency", "MiniLM: base ONNX", times, "base", "torch.onnx", 1.0, note)
