"""onnxruntime's own tools and onnxslim on exported files: `python -m tests.zoo.runtime_tools [NAME ...]`.

For each architecture of the zoo three files are written: the model as it is, with LoRA on it, and in int8. Each must
pass the full checker, symbolic shape inference, `quant_pre_process`, `quantize_dynamic`, the conversion to float16, the
MatMulNBits quantizer, onnxslim and `onnxruntime.transformers.optimizer`. Each result must load in a default session.
The optimizer must fuse no fewer nodes than in the file that torch.onnx alone writes.
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxslim import slim

import surgery
from tests.zoo import sweep, zoo

# Ops that the optimizer makes of several.
FUSED = (
    "SkipLayerNormalization", "LayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization",
    "Attention", "MultiHeadAttention", "BiasGelu", "Gelu", "FastGelu", "EmbedLayerNormalization",
)  # fmt: skip


def opens(path: Path) -> None:
    """Load the file in a default session."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def fusions(path: Path) -> collections.Counter[str]:
    """Number of each op in the result of `onnxruntime.transformers.optimizer`."""
    found = optimizer.optimize_model(str(path), model_type="bert", num_heads=4, hidden_size=32, opt_level=0)
    return collections.Counter(node.op_type for node in found.model.graph.node)


def check_tools(path: Path, folder: Path, floats: bool = True) -> collections.Counter[str]:
    """Run every tool on a file and load what it writes.

    Args:
        path: The ONNX file.
        folder: Folder for the results.
        floats: Include the tools that change float weights: `quantize_dynamic`, float16 and MatMulNBits.

    Returns:
        Number of each op after the optimizer.
    """
    onnx.checker.check_model(str(path), full_check=True)
    SymbolicShapeInference.infer_shapes(onnx.load(path), auto_merge=False, guess_output_rank=False, verbose=0)
    quant_pre_process(str(path), str(folder / "prepared.onnx"))
    slim(str(path), str(folder / "slim.onnx"))
    written = ["prepared", "slim"]
    if floats:
        quantize_dynamic(str(folder / "prepared.onnx"), str(folder / "dynamic.onnx"))
        onnx.save(convert_float_to_float16(onnx.load(path)), folder / "half.onnx")
        blocks = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=True)
        blocks.process()
        blocks.model.save_model_to_file(str(folder / "blocks.onnx"))
        written += ["dynamic", "half", "blocks"]
    for name in written:
        opens(folder / f"{name}.onnx")
    return fusions(path)


def run(name: str, _elsewhere: ProcessPoolExecutor, folder: Path) -> sweep.Outcome:
    """The outcome of one architecture, up to the first file that fails."""
    outcome = sweep.Outcome(name)
    step = "capture"
    try:
        with contextlib.chdir(folder), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            base = sweep.load(f"zoo:{name}")
            step = "plain"
            base.export(folder / "plain.onnx")
            ours = check_tools(folder / "plain.onnx", folder)
            step = "fusions"
            theirs = _fusions_of_torch(name, base, folder / "theirs.onnx")
            fewer = {op: (ours[op], theirs[op]) for op in FUSED if ours[op] < theirs[op]}
            if fewer:
                said = ", ".join(f"{op} {own}, torch.onnx {other}" for op, (own, other) in fewer.items())
                raise AssertionError(f"the optimizer fuses fewer: {said}")
            attends = any(site.role.startswith("attn.") for site in base.sites)
            target = "attn.*" if attends else "all"
            for step, pass_ in (
                ("lora", surgery.Lora(target=target, rank=2)),
                ("int8", surgery.Quantize(target=target, format="int8")),
            ):
                path = folder / f"{step}.onnx"
                base.apply(pass_).export(path, tolerance=1.0)
                check_tools(path, folder, floats=step == "lora")
    except Exception as error:
        outcome.failed = step
        outcome.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return outcome


def _fusions_of_torch(name: str, base: surgery.Program, path: Path) -> collections.Counter[str]:
    """Fusions in the file that torch.onnx alone writes; none where it cannot write one that the optimizer reads."""
    args, kwargs = base.example_inputs
    given = {"kwargs": kwargs, "dynamo": True, "dynamic_shapes": base.captured.dynamic_shapes}
    try:
        torch.onnx.export(zoo.build(name).module, args, str(path), verbose=False, **given)
        return fusions(path)
    except Exception:
        return collections.Counter()


def main(names: list[str]) -> int:
    outcomes = sweep.sweep(names or zoo.NAMES, job=run)
    failed = [o for o in outcomes if o.failed is not None and o.failed != "capture"]
    captured = [o for o in outcomes if o.failed != "capture"]
    for o in failed:
        print(f"{o.name}: {o.failed}: {o.reason}")
    print(
        f"{len(captured)} architectures; files of {len(captured) - len(failed)} pass onnxruntime's tools and onnxslim"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
