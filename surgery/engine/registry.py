"""Passes by name, from every plugin of a manager."""

from __future__ import annotations

from surgery.common.errors import PassError, PluginError, nearest
from surgery.common.plugins import CORE, Info, Plugins
from surgery.engine.contract.base import Pass

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
    if distribution and distribution != CORE:
        raise PassError(f"pass {name!r} comes from the plugin {distribution!r}; pip install {distribution}")
    hint = nearest(name, known) or f"; there are {', '.join(sorted(known))}"
    raise PassError(f"there is no pass {name!r}{hint}")
