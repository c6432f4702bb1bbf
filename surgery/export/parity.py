"""Parity check: comparison of an ONNX file with the program it was exported from.

An output y may differ by `relative(dtype) * max|y|`. Each output is compared at its own scale, because two correct
implementations differ by rounding, and rounding errors grow with the summed values.

- float32, 1e-4: a dot product of K ≤ 4096 terms summed in another order differs by about sqrt(K)·eps = 8e-6 of its
  scale, and 100 such layers with independent errors by 8e-5. Measured: 1e-6 for MiniLM, 2e-6 for a 30-layer llama.
  The check detects a LoRA whose B is 1% too large (tests/export).
- float64, 1e-11: the same estimate with the eps of float64.
- float16 and bfloat16, 10·eps (1e-2 and 8e-2): products are summed in float32 and rounded once per op, so the error
  is eps times the square root of about 100 ops. The check detects a wrong graph, but not a slightly wrong weight.
- integers and booleans: the values must be equal.

The file has to be within tolerance as written and as onnxruntime optimizes it by default, which is how users run
it. Where activations are rounded to a few levels, by the program or by onnxruntime, the default session is judged
by the rule of surgery.export.rounded_parity, and the file as written without that rounding.

Values at or above 1e30 (masks filled with the dtype's minimum), infinities and NaNs must occur at the same positions.
They do not count for the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.common.errors import ExportError
from surgery.export.rounded_parity import (
    RoundingReport,
    judge,
    rounds,
    runtime_rounds,
    unrounded,
    unrounded_file,
)
from surgery.export.runtime import OnnxModel
from surgery.export.source import ExportSource, InputSet

_HUGE = 1e30
_RELATIVE = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 10 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 10 * torch.finfo(torch.bfloat16).eps,
}
_SIZES: tuple[Mapping[str, int], ...] = ({"batch": 3, "seq": 11},)


@dataclass(frozen=True)
class OutputParity:
    """Difference of one output on one input set.

    Attributes:
        name: name of the output.
        shape: its shape.
        scale: largest magnitude of the program's output.
        error: largest difference as a fraction of the scale, for the file as written.
        optimised_error: the same with onnxruntime's default optimizations; if activations are rounded, the change
            by that rounding (`Judged.error`).
        tolerance: largest allowed difference.
        rounded: True if rounding of activations moves `optimised_error`, so that it does not affect `ok`.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    error: float
    optimised_error: float
    tolerance: float
    rounded: bool = False

    @property
    def ok(self) -> bool:
        """True if the errors are within tolerance."""
        return self.judged <= self.tolerance

    @property
    def judged(self) -> float:
        """The larger of the errors that affect `ok`."""
        return self.error if self.rounded else max(self.error, self.optimised_error)


@dataclass(frozen=True)
class ParityReport:
    """Differences of every output on every input set, for the file as written and as onnxruntime optimizes it.

    Attributes:
        outputs: the differences. If the program rounds activations, `error` is that of the file without that
            rounding.
        rounding: result of the rule for rounded activations; None if none are rounded.
    """

    outputs: tuple[OutputParity, ...]
    rounding: RoundingReport | None = None

    @property
    def ok(self) -> bool:
        """True if every output is within tolerance."""
        return all(output.ok for output in self.outputs) and (self.rounding is None or self.rounding.ok)

    @property
    def error(self) -> float:
        """Largest error of the file as written."""
        return max((output.error for output in self.outputs), default=0.0)

    @property
    def optimised_error(self) -> float:
        """Largest error of the file as onnxruntime optimizes it."""
        return max((output.optimised_error for output in self.outputs), default=0.0)

    @property
    def worst(self) -> OutputParity:
        """The output with the largest error in relation to its tolerance."""
        return max(self.outputs, key=lambda output: output.judged / (output.tolerance or 1e-45))


def check_parity(
    path: Path,
    source: ExportSource,
    inputs: Sequence[InputSet] = (),
    *,
    fresh_inputs: Callable[[Any, Mapping[str, int], int], InputSet] | None = None,
    sizes: Sequence[Mapping[str, int]] = _SIZES,
    seeds: Sequence[int] = (0,),
    relative: float | None = None,
    remove: bool = True,
    judged: Sequence[InputSet] = (),
    given: bool = False,
    tolerance: float | None = None,
) -> ParityReport:
    """Compare an ONNX file with the program.

    Args:
        path: the ONNX file.
        source: the program.
        inputs: input sets to compare on.
        fresh_inputs: function (source, sizes, seed) that creates further input sets.
        sizes: sizes passed to `fresh_inputs`.
        seeds: seeds passed to `fresh_inputs`.
        relative: tolerance as a fraction of the scale; None uses the tolerance of each dtype.
        remove: True deletes the file and its data file if the check fails.
        judged: inputs on which rounded activations are judged; by default `inputs`.
        given: True if `judged` are data, on which decisions are counted too.
        tolerance: how much rounded activations may change beyond twice the program's own rounding; see
            surgery.export.rounded_parity.

    Raises:
        ExportError: an output differs, is missing or has another shape.
        ValueError: there are no inputs to compare on.
    """
    sets = list(inputs)
    if fresh_inputs is not None:
        sets += [fresh_inputs(source, size, seed) for size in sizes for seed in seeds]
    if not sets:
        raise ValueError("check_parity needs inputs; pass inputs or fresh_inputs")
    try:
        report = without_rounding(Path(path), source, sets, relative)
        _require_ok(report, " without activation rounding" if rounds(source) else "")
        if not (rounds(source) or (report.outputs and report.outputs[0].rounded)):
            return report
        found = judge(OnnxModel(path).run, source, judged or sets, given=given, tolerance=tolerance)
        # Without outputs in floating point, the first check has said all.
        if not found.outputs:
            return report
        if not found.ok:
            raise ExportError(f"{found.said}; {_remedy(source)}")
        moved = {output.name: output.error for output in found.outputs}
        outputs = (replace(o, optimised_error=moved.get(o.name, o.optimised_error)) for o in report.outputs)
        return ParityReport(tuple(outputs), found)
    except ExportError:
        if remove:
            Path(path).unlink(missing_ok=True)
            Path(path).with_name(f"{Path(path).name}.data").unlink(missing_ok=True)
        raise


def without_rounding(
    path: Path, source: ExportSource, sets: Sequence[InputSet], relative: float | None = None
) -> ParityReport:
    """Compare at full tolerance, without the rounding of activations, which would hide errors up to one level.

    Args:
        path: the ONNX file.
        source: the program.
        sets: input sets to compare on.
        relative: tolerance as a fraction of the scale; None uses the tolerance of each dtype.
    """
    if not rounds(source):
        return _compare(path, source, sets, relative, runtime_rounds(source))
    with unrounded_file(path) as plain:
        return _compare(plain, unrounded(source), sets, relative, True)


def _remedy(source: ExportSource) -> str:
    """Remedy if rounded activations change too much."""
    if rounds(source):
        return "look for a layer that onnxruntime computes differently, or accept it with --tolerance"
    return (
        "leave the most sensitive layers out (surgery select), or accept it with --tolerance 1 and set "
        "session.qdq_matmulnbits_accuracy_level to 1 in the session"
    )


def _require_ok(report: ParityReport, without: str) -> None:
    """Raise ExportError if an output is not within tolerance."""
    if not report.ok:
        worst = report.worst
        how = without if worst.error > worst.tolerance else f"{without} in a default session of onnxruntime"
        raise ExportError(
            f"output '{worst.name}' of the ONNX file{how} differs from the program by {worst.judged:.2g} of "
            f"its scale; rounding explains at most {worst.tolerance:.2g} (shape {list(worst.shape)}); find "
            "the first wrong node with surgery.export.first_divergence"
        )


def _compare(
    path: Path, source: ExportSource, sets: Sequence[InputSet], relative: float | None, rounded: bool
) -> ParityReport:
    written, optimised = OnnxModel(path, optimised=False), OnnxModel(path)
    found = []
    for args, kwargs in sets:
        expected = source.run(args, kwargs)
        named = source.named_inputs(args, kwargs)
        got, faster = written.run(named), optimised.run(named)
        for name, value in expected.items():
            if name not in got:
                raise ExportError(f"the ONNX file has no output '{name}'; it has {', '.join(got)}")
            if got[name].shape != value.shape:
                raise ExportError(
                    f"output '{name}' has shape {list(got[name].shape)} in the ONNX file and "
                    f"{list(value.shape)} in the program: the export fixed a dimension; "
                    "name it in dynamic_shapes"
                )
            scale = scale_of(value)
            allowed = tolerance_of(value.dtype) if relative is None else relative
            found.append(
                OutputParity(
                    name=name,
                    shape=tuple(value.shape),
                    scale=scale,
                    error=difference(value, got[name]) / scale,
                    optimised_error=difference(value, faster[name]) / scale,
                    tolerance=allowed if value.dtype.is_floating_point else 0.0,
                    rounded=rounded,
                )
            )
    return ParityReport(tuple(found))


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest difference that rounding explains, as a fraction of the output's scale; 0 for integers and booleans."""
    return _RELATIVE.get(dtype, 0.0)


def scale_of(value: torch.Tensor) -> float:
    """Largest magnitude below 1e30; 1 if the tensor is empty or all zeros."""
    magnitudes = value.detach().double().abs()
    ordinary = magnitudes[magnitudes < _HUGE]
    largest = float(ordinary.max()) if ordinary.numel() else 0.0
    return largest or 1.0


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest |a - b|; infinite if the shapes, or the positions of NaNs or huge values, differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    odd = ~(a.abs() < _HUGE)
    if not torch.equal(odd, ~(b.abs() < _HUGE)) or not torch.equal(a[odd].isnan(), b[odd].isnan()):
        return float("inf")
    # Huge values differ between implementations, so only their positions and signs are compared.
    signs = a[odd].nan_to_num().sign(), b[odd].nan_to_num().sign()
    if not torch.equal(*signs):
        return float("inf")
    gaps = (a[~odd] - b[~odd]).abs()
    return float(gaps.max()) if gaps.numel() else 0.0
