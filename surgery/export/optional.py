"""Import of the optional ONNX libraries on first use."""

from __future__ import annotations

import importlib
from typing import Any

from surgery.common.errors import MissingExtraError


def require(module: str) -> Any:
    """Import a module of an optional library.

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # If an installed library lacks one of its own dependencies, the original error is more helpful.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(module.split(".")[0], "onnx") from error
