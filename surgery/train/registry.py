"""Finds objectives by name in all plugins of a manager."""

from __future__ import annotations

from surgery.common.errors import TrainingError, nearest
from surgery.common.plugins import Info, Plugins
from surgery.train.objective import Objective

ObjectiveInfo = Info[type[Objective]]


def objectives(plugins: Plugins) -> dict[str, ObjectiveInfo]:
    """Return all registered objectives by name.

    Raises:
        PluginError: two distributions register the same name.
    """
    found: dict[str, ObjectiveInfo] = plugins.once(
        "surgery_objectives", lambda: plugins.named("surgery_objectives", Objective, "objectives")
    )
    return found


def find_objective(plugins: Plugins, name: str) -> ObjectiveInfo:
    """Return the objective with this name or alias.

    Raises:
        TrainingError: there is no such objective. The error suggests the nearest names.
    """
    known = objectives(plugins)
    if name not in known:
        alias = next((info for info in known.values() if name in info.cls.aliases), None)
        if alias is not None:
            return alias
        name = name[:100]
        hint = nearest(name, known) or f"; there are {', '.join(sorted(known))}"
        raise TrainingError(f"there is no objective {name!r}{hint}")
    return known[name]
