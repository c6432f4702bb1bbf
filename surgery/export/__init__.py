"""Export to ONNX, with checks and readers of the file. onnx, onnxscript and onnxruntime are imported on first use."""

from __future__ import annotations

from surgery.export.compare import Divergence, first_divergence
from surgery.export.onnx_file import ExportReport, export_onnx
from surgery.export.parity import OutputParity, ParityReport, check_parity
from surgery.export.readback import StoredTensor, journal_of, names_survive, provenance_of
from surgery.export.runtime import OnnxModel, OnnxNode
from surgery.export.source import ExportSource, InputSet

__all__ = [
    "Divergence",
    "ExportReport",
    "ExportSource",
    "InputSet",
    "OnnxModel",
    "OnnxNode",
    "OutputParity",
    "ParityReport",
    "StoredTensor",
    "check_parity",
    "export_onnx",
    "first_divergence",
    "journal_of",
    "names_survive",
    "provenance_of",
]
