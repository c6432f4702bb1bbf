"""Readers of JSON and safetensors files from elsewhere: every way in which a file can be damaged is a SurgeryError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from surgery.common.errors import SurgeryError


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the name of its type."""
    line = next(iter(str(error).strip().splitlines()), "")[:200]
    return "".join(c if c.isprintable() else "?" for c in line) or type(error).__name__


def read_json(path: Path, failure: type[SurgeryError], remedy: str = "restore it") -> Any:
    """The value in a JSON file.

    Args:
        path: The file.
        failure: Error to raise.
        remedy: What the user can do about a damaged file, for the message.

    Raises:
        SurgeryError: `failure`, if the file cannot be read, is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror or error}; {remedy}") from None
    except RecursionError:
        raise failure(f"{path} is nested too deeply to be read; {remedy}") from None
    except ValueError as error:
        raise failure(f"{path} is not valid JSON ({first_line(error)}); {remedy}") from None


def read_tensors(path: Path, failure: type[SurgeryError], remedy: str = "restore it") -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name.

    Args:
        path: The file.
        failure: Error to raise.
        remedy: What the user can do about a damaged file, for the message.

    Raises:
        SurgeryError: `failure`, if the file cannot be read or is damaged.
    """
    try:
        return load_file(path)
    except Exception as error:  # a damaged header raises errors of several kinds
        raise failure(f"{path} is no readable safetensors file ({first_line(error)}); {remedy}") from None
