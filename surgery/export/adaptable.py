"""Export of a program as one ONNX model with a separate, checked adapter file for each LoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.capture.devices import HOME
from surgery.common.errors import ExportError
from surgery.common.files import staged_directory
from surgery.export.adapter_inputs import slots, write_adapters
from surgery.export.onnx_file import ExportReport
from surgery.export.parity import difference, scale_of, tolerance_of
from surgery.export.program import export_program, parity_inputs, source_of
from surgery.export.rounded_parity import judge, rounds, runtime_rounds
from surgery.export.runtime import OnnxModel, adapter_file
from surgery.export.source import InputSet

if TYPE_CHECKING:
    from surgery.engine.program import Program

MODEL = "model.onnx"
MANIFEST = "adapters.json"


@dataclass(frozen=True)
class AdaptableReport:
    """Result of `export_adaptable`.

    Attributes:
        path: the directory.
        model: report of the ONNX model without an adapter.
        adapters: adapter files by adapter name.
        errors: largest output difference by adapter name, as a fraction of the output's scale, between the ONNX model
            with that adapter and the program with that adapter alone.
    """

    path: Path
    model: ExportReport
    adapters: Mapping[str, Path]
    errors: Mapping[str, float]


def export_adaptable(
    program: Program,
    path: Any,
    *,
    opset: int | None = None,
    external_data: bool | None = None,
    seed: int = 0,
    lowerings: Mapping[Any, Any] | None = None,
    cpu: str | None = None,
    data: Sequence[InputSet] = (),
    tolerance: float | None = None,
    overwrite: bool = False,
) -> AdaptableReport:
    """Write a directory with an ONNX model that takes LoRA weights as optional inputs.

    The directory holds `model.onnx`, one `NAME.onnx_adapter` for each LoRA of the program, and `adapters.json`, which
    lists them. To use an adapter in onnxruntime, call `LoraAdapter().Load(file)`,
    `RunOptions.add_active_adapter(adapter)` and `session.run(…, options)`.

    Args:
        program: the program.
        path: the directory to write.
        opset: as for `export_program`.
        external_data: as for `export_program`.
        seed: seed of the inputs for the checks.
        lowerings: as for `export_program`.
        cpu: as for `export_program`.
        data: as for `export_program`.
        tolerance: as for `export_program`.
        overwrite: True replaces an existing directory.

    Raises:
        ExportError: the program has no LoRA, or the outputs with an adapter differ from the program's.
    """
    slotted = slots(program.to(HOME))
    with staged_directory(Path(path), overwrite) as folder:
        report = export_program(
            slotted.program,
            folder / MODEL,
            opset=opset,
            external_data=external_data,
            seed=seed,
            lowerings=lowerings,
            optional=slotted.names,
            cpu=cpu,
            data=data,
            tolerance=tolerance,
        )
        write_adapters(slotted.adapters, report.stored, folder)
        manifest = {
            "model": MODEL,
            "adapters": {name: adapter_file(folder, name).name for name in slotted.adapters},
            "inputs": [report.stored[name] for name in slotted.names],
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        # Check the files before the directory is moved to its place.
        model = OnnxModel(folder / MODEL)
        errors = {
            name: _error(
                alone, model, adapter_file(folder, name), name, parity_inputs(alone, seed), data, tolerance
            )
            for name, alone in slotted.alone.items()
        }
    place = Path(path)
    return AdaptableReport(
        place, report, {name: adapter_file(place, name) for name in slotted.adapters}, errors
    )


def _error(
    alone: Program,
    model: OnnxModel,
    file: Path,
    name: str,
    sets: Sequence[InputSet],
    data: Sequence[InputSet],
    tolerance: float | None,
) -> float:
    """Largest difference between the model with adapter `name` and the program `alone`, relative to the scale."""
    source, worst = source_of(alone), 0.0
    if rounds(source) or runtime_rounds(source):
        found = judge(
            lambda named: model.run(named, [file]),
            source,
            data or sets,
            given=bool(data),
            tolerance=tolerance,
        )
        if not found.ok:
            raise ExportError(f"with the adapter {name!r}: {found.said}; accept it with --tolerance")
        return found.worst.error
    for args, kwargs in sets:
        got = model.run(source.named_inputs(args, kwargs), [file])
        for output, value in source.run(args, kwargs).items():
            error = difference(value, got[output]) / scale_of(value)
            if error > tolerance_of(value.dtype):
                raise ExportError(
                    f"with the adapter {name!r}, output '{output}' of the ONNX model differs from the program by "
                    f"{error:.1e} of its scale; rounding explains at most {tolerance_of(value.dtype):.0e}"
                )
            worst = max(worst, error)
    return worst
