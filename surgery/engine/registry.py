"""Passes by name, from every plugin of a manager."""

from __future__ import annotations

from typing import Any

from surgery.common.errors import PassError, PluginError, nearest
from surgery.common.plugin_files import file_of, is_file
from surgery.common.plugins import CORE, Info, Plugins
from surgery.engine.contract.base import Pass
from surgery.engine.contract.op import OpPass

PassInfo = Info[type[Pass]]


def passes(plugins: Plugins) -> dict[str, PassInfo]:
    """Passes by name.

    Raises:
        PluginError: Two distributions register the same name.
    """
    found: dict[str, PassInfo] = plugins.once(
        "surgery_passes", lambda: plugins.named("surgery_passes", Pass, "passes")
    )
    return found


def registered(plugins: Plugins, cls: type[Pass]) -> PassInfo:
    """The entry of a pass's class. A class that no plugin registers is added under its file's name.

    Raises:
        PassError: The class has no name, or another class has it.
    """
    found = passes(plugins)
    if not cls.name:
        raise PassError(f"the class {cls.__name__} has no name; assign one: name = 'my-pass'")
    info = found.setdefault(cls.name, Info(cls, file_of(cls), ""))
    # A module that was imported twice has the same class twice.
    if info.cls is not cls and (info.cls.__module__, info.cls.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise PassError(
            f"two passes are named {cls.name!r}: the class {cls.__name__} and one from {info.distribution!r}; rename it"
        )
    return info


def lowerings(plugins: Plugins) -> dict[Any, Any]:
    """ONNX forms of ops, op -> onnxscript function: those of the hook, and those that passes with an op declare."""
    own: dict[Any, Any] = {}
    for info in passes(plugins).values():
        if issubclass(info.cls, OpPass):
            own.update(info.cls.lowerings)
    return own | plugins.lowerings


def find_pass(plugins: Plugins, name: str, distribution: str = "") -> PassInfo:
    """The pass of a name.

    Args:
        plugins: The plugin manager.
        name: Name of the pass.
        distribution: Python distribution that provides the pass, if known; it is named in the error.

    Raises:
        PassError: No pass has this name; the message lists the nearest names, or the distribution to install.
        PluginError: The plugin that provides the pass does not load.
    """
    known = passes(plugins)
    if name in known:
        return known[name]
    name = name[:100]
    for entry_point, why in plugins.broken.items():
        if distribution and distribution == entry_point.partition(" ")[0]:
            raise PluginError(
                f"pass {name!r} comes from the plugin {entry_point}, which does not load: {why}"
            )
    if is_file(distribution):
        raise PassError(
            f"pass {name!r} comes from {distribution}, which no installed plugin has; give the file with "
            f"--plugin {distribution}, or its class as plugins=make_plugin_manager(plugins=(CLASS,))"
        )
    if distribution and distribution != CORE:
        raise PassError(f"pass {name!r} comes from the plugin {distribution!r}; pip install {distribution}")
    hint = nearest(name, known) or f"; there are {', '.join(sorted(known))}"
    raise PassError(f"there is no pass {name!r}{hint}")
