"""Loading of a model reference such as `hf:DIR` by the plugin that supports its scheme."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, PluginError, nearest
from surgery.common.plugins import CORE, Plugins
from surgery.common.progress import stage


def load_model(ref: str, options: LoadOptions, plugins: Plugins) -> LoadedModel:
    """Load a model reference with the plugin that declares its scheme.

    Args:
        ref: the reference, for example `hf:DIR` or `FILE.pt2`.
        options: load options passed to the plugin.
        plugins: the plugin manager.

    Raises:
        LoadError: no plugin supports the reference, or loading fails.
        PluginError: the loader of a plugin fails, or returns something else than a LoadedModel.
    """
    for impl in _loaders(ref, plugins):
        with stage(f"loading {ref}"):
            loaded = plugins.call(impl, ref=ref, options=options)
        if loaded is None:
            continue
        if not isinstance(loaded, LoadedModel):
            raise PluginError(
                f"plugin {plugins.distribution_of(impl)[0]!r} returns {type(loaded).__name__} for {ref!r}; return a "
                "LoadedModel (surgery.api.programs), or None"
            )
        return with_patches(loaded, plugins)
    schemes = [f"{scheme}:" for scheme in plugins.schemes]
    hint = nearest(ref.partition(":")[0] + ":", schemes) if ":" in ref else ""
    known = (
        "hf:DIR, hf:ORG/NAME, timm:NAME, diffusers:DIR, py:package.module:callable, FILE.pt2 or a directory saved by "
        "surgery"
    )
    raise LoadError(f"{ref!r} is not a model reference{hint or '; use ' + known}")


def with_patches(loaded: LoadedModel, plugins: Plugins) -> LoadedModel:
    """Add the patches of plugins to those that the export of the model has already."""
    impls = plugins.implementations("surgery_capture_patches")
    if not impls:
        return loaded

    @contextlib.contextmanager
    def patches() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(loaded.patches())
            for impl in impls:
                for patch in plugins.call(impl):
                    stack.enter_context(patch(loaded.module))
            yield

    return replace(loaded, patches=patches)


def _loaders(ref: str, plugins: Plugins) -> list[Any]:
    """The loaders to ask for a reference: that of its scheme, or else those that declare no scheme."""
    scheme, colon, _ = ref.partition(":")
    if colon and scheme in plugins.schemes:
        return [plugins.schemes[scheme]]
    declared = {impl.plugin_name for impl in plugins.implementations("surgery_load_schemes")}
    return [
        impl
        for impl in plugins.implementations("surgery_load_model")
        if impl.plugin_name not in declared or plugins.distribution_of(impl)[0] == CORE
    ]


def loader_of(ref: str, plugins: Plugins) -> tuple[str, str]:
    """Name and version of the distribution that loads references of this scheme; empty if nobody declares it."""
    scheme, colon, _ = ref.partition(":")
    impl = plugins.schemes.get(scheme) if colon else None
    return plugins.distribution_of(impl) if impl is not None else ("", "")
