"""Does an ONNX file compute what the program computes?

Tolerance: an output y may be off by `relative(dtype) * max|y|`, each output against its own scale, because
what two correct implementations differ by is rounding, and rounding grows with the values that were summed.

- float32, 1e-4. One product of K ≤ 4096 terms summed in another order is off by about sqrt(K)·eps = 8e-6 of
  its scale; 100 such layers in a row, independent, by 8e-5. Measured: 1e-6 for MiniLM, 2e-6 for a 30-layer llama.
  A LoRA whose B is 1% too large is found (tests/export).
- float64, 1e-11: the same with its eps.
- float16 and bfloat16, 10·eps (1e-2 and 8e-2): products are summed in float32 and rounded once per op, so the
  error is eps times the root of about 100 ops. Such a check finds a wrong graph, not a slightly wrong weight.
- integers and booleans: equal.

Programs that round activations to a few steps are held to more than that; see surgery.export.rounded_parity.

Values at or above 1e30 (masks filled with the dtype's minimum), infinities and NaNs must stand in the same
places and are left out of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.common.errors import ExportError
from surgery.export.rounded_parity import ONE_STEP, rounds, sensitivity, unrounded, unrounded_file
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
    """One output on one input set.

    error: the largest difference, as a fraction of the output's scale, of the file as it is written.
    optimised_error: the same with onnxruntime's default optimisations; reported, not judged.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    error: float
    optimised_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class ParityReport:
    """Every output on every input set; `ok` judges the file as it is written."""

    outputs: tuple[OutputParity, ...]

    @property
    def ok(self) -> bool:
        return all(output.ok for output in self.outputs)

    @property
    def error(self) -> float:
        return max((output.error for output in self.outputs), default=0.0)

    @property
    def optimised_error(self) -> float:
        return max((output.optimised_error for output in self.outputs), default=0.0)

    @property
    def worst(self) -> OutputParity:
        return max(self.outputs, key=lambda output: output.error / (output.tolerance or 1e-45))


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
) -> ParityReport:
    """Compare the file with the program on `inputs`, and on what `fresh_inputs(source, size, seed)` makes.

    relative: instead of the tolerance for each dtype above.
    remove: delete the file, and its data file, where it fails.

    Raises ExportError where an output differs, is missing or has another shape; ValueError where there is
    nothing to compare on.
    """
    sets = list(inputs)
    if fresh_inputs is not None:
        sets += [fresh_inputs(source, size, seed) for size in sizes for seed in seeds]
    if not sets:
        raise ValueError("check_parity needs inputs, or fresh_inputs to make them")
    try:
        if rounds(source):
            with unrounded_file(Path(path)) as plain:
                if plain is not None:
                    found = _compare(plain, unrounded(source), sets, relative)
                    _hold(found, " without the rounding of activations")
        report = _compare(Path(path), source, sets, relative)
        _hold(report)
        return report
    except ExportError:
        if remove:
            Path(path).unlink(missing_ok=True)
            Path(path).with_name(f"{Path(path).name}.data").unlink(missing_ok=True)
        raise


def _hold(report: ParityReport, how: str = "") -> None:
    if not report.ok:
        worst = report.worst
        raise ExportError(
            f"output '{worst.name}' of the ONNX file{how} differs from the program by {worst.error:.2g} of "
            f"its scale, where {worst.tolerance:.2g} is rounding (shape {list(worst.shape)}): find "
            "the first wrong node with surgery.export.first_divergence"
        )


def _compare(
    path: Path, source: ExportSource, sets: Sequence[InputSet], relative: float | None
) -> ParityReport:
    written, optimised = OnnxModel(path, optimised=False), OnnxModel(path)
    found = []
    for args, kwargs in sets:
        expected = source.run(args, kwargs)
        named = source.named_inputs(args, kwargs)
        got, faster = written.run(named), optimised.run(named)
        moved = sensitivity(source, args, kwargs) if rounds(source) else []
        for name, value in expected.items():
            if name not in got:
                raise ExportError(f"the ONNX file has no output '{name}'; it has {', '.join(got)}")
            if got[name].shape != value.shape:
                raise ExportError(
                    f"output '{name}' has shape {list(got[name].shape)} in the ONNX file and "
                    f"{list(value.shape)} in the program: a dimension was fixed while "
                    "exporting; name it in dynamic_shapes"
                )
            scale = scale_of(value)
            allowed = tolerance_of(value.dtype) if relative is None else relative
            if moved:
                steps = (2 * difference(value, other[name]) / scale for other in moved)
                allowed = max(allowed, ONE_STEP, *steps)
            found.append(
                OutputParity(
                    name=name,
                    shape=tuple(value.shape),
                    scale=scale,
                    error=difference(value, got[name]) / scale,
                    optimised_error=difference(value, faster[name]) / scale,
                    tolerance=allowed if value.dtype.is_floating_point else 0.0,
                )
            )
    return ParityReport(tuple(found))


def tolerance_of(dtype: torch.dtype) -> float:
    """The fraction of an output's scale that rounding accounts for; 0 for integers and booleans."""
    return _RELATIVE.get(dtype, 0.0)


def scale_of(value: torch.Tensor) -> float:
    """The largest ordinary magnitude; 1 where there is none (empty, all zeros)."""
    magnitudes = value.detach().double().abs()
    ordinary = magnitudes[magnitudes < _HUGE]
    largest = float(ordinary.max()) if ordinary.numel() else 0.0
    return largest or 1.0


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest |a - b|; infinite where shapes, NaNs, or huge values do not stand in the same places."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    odd = ~(a.abs() < _HUGE)
    if not torch.equal(odd, ~(b.abs() < _HUGE)) or not torch.equal(a[odd].isnan(), b[odd].isnan()):
        return float("inf")
    signs = a[odd].nan_to_num().sign(), b[odd].nan_to_num().sign()
    if not torch.equal(*signs):
        return float("inf")
    gaps = (a[~odd] - b[~odd]).abs()
    return float(gaps.max()) if gaps.numel() else 0.0
