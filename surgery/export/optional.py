"""ONNX's libraries, imported when they are first needed: they are an extra."""

from __future__ import annotations

import importlib
from typing import Any

from surgery.common.errors import MissingExtraError


def require(module: str) -> Any:
    """The imported `module`; raises MissingExtraError where its distribution is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A library that is there but lacks something of its own is a different fault: let it show.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(module.split(".")[0], "onnx") from error
