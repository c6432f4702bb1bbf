"""Hook implementation of the built-in loaders. The library of a loader is imported only when it is used."""

from __future__ import annotations

from importlib import import_module

from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.hooks import hookimpl

_LOADERS = {
    "hf:": "surgery.capture.hf",
    "timm:": "surgery.capture.timm",
    "py:": "surgery.capture.py",
}


@hookimpl
def surgery_load_model(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load hf:DIR_OR_ID, timm:NAME, py:package.module:callable or FILE.pt2; None for any other reference."""
    for prefix, module in _LOADERS.items():
        if ref.startswith(prefix):
            return import_module(module).load(ref, options)
    return import_module("surgery.capture.pt2").load(ref, options)
