"""The installed plugins: each distribution with what its hooks add, what is broken, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from surgery.cli.plugins import command_entry_points
from surgery.cli.render import console, print_json
from surgery.common import hooks
from surgery.common.errors import SurgeryError
from surgery.common.plugins import Plugins

# Hooks whose result is a list of classes or names, or a table by name or op.
_NAMED = (
    "surgery_passes",
    "surgery_objectives",
    "surgery_weight_ops",
    "surgery_onnx_lowerings",
    "surgery_load_schemes",
    "surgery_capture_patches",
    "surgery_writers",
)


@dataclass
class Distribution:
    """One distribution.

    Attributes:
        name: Name of the distribution, or of a file.
        version: Its version, "" for a file.
        hooks: Hook -> names of what it adds; none for a hook that is called for other reasons.
    """

    name: str
    version: str
    hooks: dict[str, list[str]] = field(default_factory=dict)


def distributions(plugins: Plugins) -> list[Distribution]:
    """Every distribution with hooks or commands, built-in ones first."""
    found: dict[str, Distribution] = {}
    for hook in (name for name in vars(hooks) if name.startswith("surgery_")):
        for impl in plugins.implementations(hook):
            name, version = plugins.distribution_of(impl)
            own = found.setdefault(name, Distribution(name, version))
            own.hooks.setdefault(hook, []).extend(_added(plugins, hook, impl))
    for command, points in command_entry_points().items():
        for point in points:
            name = point.dist.name if point.dist else point.value
            own = found.setdefault(name, Distribution(name, point.dist.version if point.dist else ""))
            own.hooks.setdefault("surgery.commands", []).append(command)
    return list(found.values())


def _added(plugins: Plugins, hook: str, impl: Any) -> list[str]:
    """Names of what an implementation adds."""
    if hook not in _NAMED:
        return []
    try:
        given = plugins.call(impl)
    except SurgeryError as error:
        return [str(error)]
    return sorted(str(getattr(each, "name", each)) if isinstance(each, type) else str(each) for each in given)


def show_plugins(plugins: Plugins, as_json: bool) -> None:
    """Print every distribution, its hooks, what is broken and why.

    Args:
        plugins: plugin manager.
        as_json: print JSON instead.
    """
    found = distributions(plugins)
    if as_json:
        listed = [{"name": d.name, "version": d.version, "hooks": d.hooks} for d in found]
        print_json({"plugins": listed, "broken": plugins.broken, "left_out": plugins.notes})
        return
    out = console()
    for each in found:
        out.print(Text(f"{each.name} {each.version}".rstrip(), style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 1))
        for hook, names in each.hooks.items():
            title = hook.removeprefix("surgery_").replace("surgery.commands", "commands").replace("_", " ")
            table.add_row(title, Text(", ".join(names), style="cyan"))
        out.print(table)
    for title, reason in plugins.broken.items():
        out.print(Text(f"{title}: broken: {reason}", style="red"))
    for note in plugins.notes:
        out.print(Text(f"left out: {note}", style="yellow"))
