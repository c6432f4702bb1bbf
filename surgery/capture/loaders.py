"""Hook implementation of the built-in loaders. The library of a loader is imported only when it is used."""

from __future__ import annotations

import re
from importlib import import_module

from surgery.capture.hf_config import PREFIX, is_sentence_task
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import PluginError
from surgery.common.hooks import hookimpl

# Loaders of models that a library knows by name: they take a dtype, and can make random weights.
OF_A_LIBRARY = ("hf:", "timm:", "diffusers:")
_LOADERS = {
    PREFIX: "surgery.capture.hf",
    "timm:": "surgery.capture.timm",
    "diffusers:": "surgery.capture.diffusers",
    "py:": "surgery.capture.py",
}


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")


def _check_schemes(given: object) -> None:
    """Raise PluginError if a hook returned anything but a list of schemes, without their colons."""
    listed = isinstance(given, (list, tuple)) and all(isinstance(one, str) for one in given)
    if not listed or not all(_SCHEME.fullmatch(one) for one in given):  # type: ignore[attr-defined]
        raise PluginError(
            f"it returns {given!r} from surgery_load_schemes; return a list such as ['myhub'] for myhub:NAME"
        )


def _check_patches(given: object) -> None:
    """Raise PluginError if a hook returned anything but a list of functions."""
    if not isinstance(given, (list, tuple)) or not all(callable(one) for one in given):
        raise PluginError(
            f"it returns {given!r} from surgery_capture_patches; return a list of functions (module -> context manager)"
        )


CHECKS_OF_HOOKS = {"surgery_load_schemes": _check_schemes, "surgery_capture_patches": _check_patches}


@hookimpl
def surgery_load_schemes() -> list[str]:
    """Schemes of the built-in loaders; a `.pt2` file has none."""
    return [prefix.removesuffix(":") for prefix in _LOADERS]


@hookimpl
def surgery_load_model(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load hf:, timm:, diffusers: and py: references and FILE.pt2; None for any other reference."""
    for prefix, module in _LOADERS.items():
        if ref.startswith(prefix):
            if prefix == PREFIX and is_sentence_task(options.task):
                module = "surgery.capture.sentence.loader"
            return import_module(module).load(ref, options)
    return import_module("surgery.capture.pt2").load(ref, options)
