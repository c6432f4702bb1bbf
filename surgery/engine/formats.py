"""Options and results of the built-in output formats, for type checkers and editors.

The writers are in higher layers and are found by the name of their format. tests/engine/test_formats.py compares these
declarations with the signatures of the writers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

from surgery.engine.contract.combination import Majority
from surgery.engine.probe import InputSet

StrPath = str | os.PathLike[str]


class ApplyOptions(TypedDict, total=False):
    """Options of `Program.apply`, except `verify`."""

    freeze_base: bool | None
    data: Sequence[InputSet]


class CombineOptions(TypedDict, total=False):
    """Options of `Program.combine` besides weights, method and label."""

    rank: int | None
    density: float | None
    majority: Majority
    seed: int
    keep: bool


class OnnxOptions(TypedDict, total=False):
    """Options of the format "onnx"; see surgery.export.program.export_program."""

    opset: int | None
    external_data: bool | None
    seed: int
    lowerings: Mapping[Any, Any] | None
    optional: Sequence[str]
    cpu: str | None
    data: Sequence[InputSet]
    tolerance: float | None
    only: str | None


class AdaptableOptions(TypedDict, total=False):
    """Options of the format "onnx-adapters"; see surgery.export.adaptable.export_adaptable."""

    opset: int | None
    external_data: bool | None
    seed: int
    lowerings: Mapping[Any, Any] | None
    cpu: str | None
    data: Sequence[InputSet]
    tolerance: float | None
    overwrite: bool


class GenerationOptions(TypedDict, total=False):
    """Options of the format "onnx-generate"; see surgery.export.generation.export_generation."""

    opset: int | None
    adapters_as_inputs: bool
    seed: int
    overwrite: bool
    cpu: str | None
    data: Sequence[InputSet]
    tolerance: float | None


class OnnxResult(Protocol):
    """Result of `Program.export`, a surgery.export.onnx_file.ExportReport."""

    @property
    def path(self) -> Path:
        """The model file."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The model file, and the data file if the weights are stored separately."""
        ...

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        ...

    @property
    def opset(self) -> int:
        """ONNX opset of the file."""
        ...

    @property
    def nodes(self) -> int:
        """Number of ONNX nodes in the file."""
        ...

    @property
    def inputs(self) -> Mapping[str, tuple[int | str, ...]]:
        """Shapes of the inputs by name, with named dynamic axes."""
        ...

    @property
    def outputs(self) -> Mapping[str, tuple[int | str, ...]]:
        """Shapes of the outputs by name, with named dynamic axes."""
        ...

    @property
    def stored(self) -> Mapping[str, str]:
        """Tensor of the file that stores each weight of the program, by name."""
        ...

    @property
    def seconds(self) -> float:
        """Duration of the export."""
        ...

    @property
    def parity(self) -> Any:
        """Result of the comparison with onnxruntime, a surgery.export.parity.ParityReport."""
        ...


class AdaptableResult(Protocol):
    """Result of `Program.export_adaptable`, a surgery.export.adaptable.AdaptableReport."""

    @property
    def path(self) -> Path:
        """The directory."""
        ...

    @property
    def model(self) -> OnnxResult:
        """Result for the model without an adapter."""
        ...

    @property
    def adapters(self) -> Mapping[str, Path]:
        """Adapter files by adapter name."""
        ...

    @property
    def errors(self) -> Mapping[str, float]:
        """Largest difference of the outputs by adapter name, as a fraction of their scale."""
        ...


class GenerationResult(Protocol):
    """Result of `Program.export_generation`, a surgery.export.generation.GenerationReport."""

    @property
    def path(self) -> Path:
        """The directory."""
        ...

    @property
    def size(self) -> int:
        """Total size of its files in bytes."""
        ...

    @property
    def error(self) -> float:
        """Largest difference of the logits in any step, as a fraction of their scale."""
        ...

    @property
    def tokens(self) -> int:
        """Number of greedy tokens that are equal."""
        ...

    @property
    def ties(self) -> int:
        """Number of rows in which a token differs although the logits agree within rounding."""
        ...

    @property
    def sampled(self) -> int:
        """Number of sampled tokens that are equal."""
        ...

    @property
    def seconds(self) -> float:
        """Duration of the export."""
        ...

    @property
    def adapters(self) -> Mapping[str, Path]:
        """Adapter files by adapter name."""
        ...
