"""A program as one ONNX model and an adapter file for each LoRA, checked one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.common.errors import ExportError
from surgery.common.files import staged_directory
from surgery.export.adapter_inputs import slots, write_adapters
from surgery.export.onnx_file import ExportReport
from surgery.export.parity import difference, scale_of, tolerance_of
from surgery.export.program import export_program, parity_inputs, source_of
from surgery.export.runtime import OnnxModel, adapter_file

if TYPE_CHECKING:
    from surgery.engine.program import Program

MODEL = "model.onnx"
MANIFEST = "adapters.json"


@dataclass(frozen=True)
class AdaptableReport:
    """model: of the file with no adapter. adapters: files by name, and errors: how far, over the outputs' scale, the
    model with each is from the program with that adapter alone."""

    path: Path
    model: ExportReport
    adapters: Mapping[str, Path]
    errors: Mapping[str, float]


def export_adaptable(
    program: Program, path: Any, *, seed: int = 0, overwrite: bool = False, **options: Any
) -> AdaptableReport:
    """Write a directory: `model.onnx`, whose LoRA is optional inputs, `NAME.onnx_adapter` for each that the program
    carries, and `adapters.json`, which lists them. options: as for `export_program`.

    In onnxruntime: `LoraAdapter().Load(file)`, `RunOptions.add_active_adapter(adapter)`, `session.run(…, options)`.
    Raises ExportError where there is no LoRA, or an adapter's outputs are not those of the program.
    """
    slotted = slots(program)
    with staged_directory(Path(path), overwrite) as folder:
        report = export_program(slotted.program, folder / MODEL, seed=seed, optional=slotted.names, **options)
        write_adapters(slotted.adapters, report.stored, folder)
        told = {
            "model": MODEL,
            "adapters": {name: adapter_file(folder, name).name for name in slotted.adapters},
            "inputs": [report.stored[name] for name in slotted.names],
        }
        (folder / MANIFEST).write_text(json.dumps(told, indent=1))
        model = OnnxModel(folder / MODEL)
        errors = {name: _error(alone, model, folder, name, seed) for name, alone in slotted.alone.items()}
    place = Path(path)
    return AdaptableReport(
        place, report, {name: adapter_file(place, name) for name in slotted.adapters}, errors
    )


def _error(alone: Program, model: OnnxModel, folder: Path, name: str, seed: int) -> float:
    source, worst = source_of(alone), 0.0
    for args, kwargs in parity_inputs(alone, seed):
        got = model.run(source.named_inputs(args, kwargs), [adapter_file(folder, name)])
        for output, value in source.run(args, kwargs).items():
            error = difference(value, got[output]) / scale_of(value)
            if error > tolerance_of(value.dtype):
                raise ExportError(
                    f"with the adapter {name!r}, output '{output}' of the ONNX model is {error:.1e} of its scale from "
                    f"the program's, where {tolerance_of(value.dtype):.0e} is rounding"
                )
            worst = max(worst, error)
    return worst
