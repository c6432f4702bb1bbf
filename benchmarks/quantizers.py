"""Quantizers of other libraries: onnxruntime's on the fp32 file, and torchao exported with torch.onnx."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import onnx

from benchmarks.models import MissingPeer, torch_onnx
from benchmarks.subjects import Subject


def dynamic(subject: Subject, path: Path, plain: Path) -> None:
    """onnxruntime's quantize_dynamic, per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = _prepared(plain, path)
    quantize_dynamic(str(prepared), str(path), weight_type=QuantType.QInt8, per_channel=True)
    prepared.unlink()


def static(subject: Subject, path: Path, plain: Path, **options: Any) -> None:
    """onnxruntime's quantize_static, per channel, on the subject's calibration data."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    names = _inputs(plain)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.sets = iter(subject.data)

        def get_next(self) -> dict[str, Any] | None:
            given = next(self.sets, None)
            if given is None:
                return None
            args, kwargs = given
            return {name: t.numpy() for name, t in {**dict(zip(names, args, strict=False)), **kwargs}.items()}

    prepared = _prepared(plain, path)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(prepared), str(path), Reader(), per_channel=True, **kinds, **options)
    prepared.unlink()


def static_products(subject: Subject, path: Path, plain: Path) -> None:
    """onnxruntime's quantize_static, only for ops that multiply with weights."""
    static(subject, path, plain, op_types_to_quantize=["MatMul", "Gemm", "Conv"])


def nbits(subject: Subject, path: Path, plain: Path) -> None:
    """onnxruntime's MatMulNBits, 4 bits, groups of 32, symmetric."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(str(plain)), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


def torchao(subject: Subject, path: Path, plain: Path) -> None:
    """torchao's weight-only int8 on the module, exported by torch.onnx."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingPeer("torchao is not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    changed = copy.deepcopy(subject.program.base.loaded.module).eval()
    quantize_(changed, Int8WeightOnlyConfig())
    outputs = [value.name for value in onnx.load(str(plain), load_external_data=False).graph.output]
    torch_onnx(subject.program, changed, path, input_names=_inputs(plain), output_names=outputs)


def _inputs(plain: Path) -> list[str]:
    return [value.name for value in onnx.load(str(plain), load_external_data=False).graph.input]


def _prepared(plain: Path, path: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    return prepared
