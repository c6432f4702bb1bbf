"""The options that `Program` declares for type checkers are those of the writers, with their types."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest

from surgery.common.plugins import make_plugin_manager
from surgery.engine import formats
from surgery.engine.program import Program
from surgery.export.adaptable import AdaptableReport
from surgery.export.generation import GenerationReport
from surgery.export.onnx_file import ExportReport

WRITERS = {
    "onnx": formats.OnnxOptions,
    "onnx-adapters": formats.AdaptableOptions,
    "onnx-generate": formats.GenerationOptions,
}


def keywords(function) -> dict[str, object]:
    """Keyword-only parameters with their types."""
    hints = get_type_hints(function)
    given = inspect.signature(function).parameters.values()
    return {p.name: hints[p.name] for p in given if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("format", WRITERS)
def test_the_options_of_a_writer(format):
    from surgery.export import adaptable, generation, program

    function = {
        "onnx": program.export_program,
        "onnx-adapters": adaptable.export_adaptable,
        "onnx-generate": generation.export_generation,
    }[format]
    assert make_plugin_manager(entry_points=False).writers[format] is function
    # `Program` is imported for type checkers only in these modules.
    function.__globals__.setdefault("Program", Program)
    assert keywords(function) == get_type_hints(WRITERS[format])


def test_the_options_of_the_verbs():
    combine, apply = keywords(Program.combine), keywords(Program.apply)
    assert combine.pop("label") is str
    assert combine == get_type_hints(formats.CombineOptions)
    assert apply.pop("verify") is bool
    assert apply == get_type_hints(formats.ApplyOptions)


@pytest.mark.parametrize(
    ("protocol", "report"),
    [
        (formats.OnnxResult, ExportReport),
        (formats.AdaptableResult, AdaptableReport),
        (formats.GenerationResult, GenerationReport),
    ],
)
def test_a_result_has_what_it_declares(protocol, report):
    declared = {name for name, value in vars(protocol).items() if isinstance(value, property)}
    assert len(declared) > 3
    assert declared <= set(report.__dataclass_fields__)
