"""Loading of a model reference such as `hf:DIR` by the first plugin that supports it."""

from __future__ import annotations

from surgery.capture import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, nearest
from surgery.common.plugins import Plugins

SCHEMES = ("hf:", "timm:", "py:")


def load_model(ref: str, options: LoadOptions, plugins: Plugins) -> LoadedModel:
    """Load a model reference with the first plugin that supports it.

    Args:
        ref: the reference, for example `hf:DIR` or `FILE.pt2`.
        options: load options passed to the plugin.
        plugins: the plugin manager.

    Raises:
        LoadError: no plugin supports the reference, or loading fails.
    """
    loaded = plugins.hook.surgery_load_model(ref=ref, options=options)
    if loaded is None:
        hint = nearest(ref.partition(":")[0] + ":", SCHEMES) if ":" in ref else ""
        known = "hf:DIR, timm:NAME, py:package.module:callable, FILE.pt2 or a directory saved by surgery"
        raise LoadError(f"{ref!r} is not a model reference{hint or '; use ' + known}")
    return loaded
