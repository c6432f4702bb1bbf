"""From a reference, such as `hf:DIR`, to a module with example inputs, by the first plugin that knows it."""

from __future__ import annotations

from surgery.capture import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, nearest
from surgery.common.plugins import Plugins

SCHEMES = ("hf:", "timm:", "py:")


def load_model(ref: str, options: LoadOptions, plugins: Plugins) -> LoadedModel:
    """The first plugin's LoadedModel for a reference. Raises LoadError where none knows it."""
    loaded = plugins.hook.surgery_load_model(ref=ref, options=options)
    if loaded is None:
        hint = nearest(ref.partition(":")[0] + ":", SCHEMES) if ":" in ref else ""
        known = "hf:DIR, timm:NAME, py:package.module:callable, FILE.pt2 or a directory that surgery saved"
        raise LoadError(f"{ref!r} is no model reference{hint or '; use ' + known}")
    return loaded
