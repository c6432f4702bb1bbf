"""Registration of the ONNX formats, which `Program.export` looks up by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.common.hooks import hookimpl
from surgery.export.adaptable import export_adaptable
from surgery.export.generation import export_generation
from surgery.export.program import export_program
from surgery.export.sentence import export_sentence


@hookimpl
def surgery_writers() -> dict[str, Callable[..., Any]]:
    """Map each format to its function (program, path, **options)."""
    return {
        "onnx": export_program,
        "onnx-generate": export_generation,
        "onnx-adapters": export_adaptable,
        "onnx-sentence-transformers": export_sentence,
    }
