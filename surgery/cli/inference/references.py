"""Kinds of references to a finished model, told apart without loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from surgery.common.errors import LoadError, nearest

Kind = Literal["program", "transformers", "onnx", "onnx-generate"]

ONNX = ".onnx"
# Marks of the directories that surgery and transformers write, in the order in which they decide.
_MARKS: tuple[tuple[str, Kind], ...] = (
    ("surgery.json", "program"),
    ("export.json", "onnx-generate"),
    ("model.onnx", "onnx"),
    ("config.json", "transformers"),
)


def kind_of(ref: str) -> Kind:
    """The kind of a reference.

    A transformers directory may be named with or without `hf:`. Other schemes (`timm:`, `py:`) are programs.

    Raises:
        LoadError: there is no such path, or a directory holds no model.
    """
    scheme, colon, rest = ref.partition(":")
    path = Path(ref)
    if scheme == "hf" and colon:
        return "transformers"
    if path.is_dir():
        found = next((kind for name, kind in _MARKS if (path / name).is_file()), None)
        if found is None:
            raise LoadError(
                f"{ref} holds no model; name a directory that surgery or transformers wrote, or an ONNX file in it"
            )
        return found
    if colon and len(scheme) > 1 and rest:
        return "program"
    if not path.exists():
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LoadError(f"{ref} does not exist{nearest(path.name, beside)}; check the path")
    return "onnx" if path.suffix == ONNX else "program"
