"""Views of the registered passes and objectives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from surgery.cli.families import by_family
from surgery.cli.reference import example_of, objective_pages, pages, write_pages
from surgery.cli.render import console, print_json
from surgery.common.options import describe_options
from surgery.common.plugins import CORE, Info, Plugins
from surgery.engine.contract.base import RewritePass, merges, with_defaults
from surgery.engine.registry import find_pass, passes
from surgery.train.registry import find_objective, objectives


def show_passes(plugins: Plugins, name: str | None, write: Path | None, as_json: bool) -> None:
    """Print all passes, or one pass with its options; or write a reference page of each.

    Args:
        plugins: plugin manager that the passes come from.
        name: pass to print with its options, None for the list.
        write: directory of the pages; nothing else is printed then.
        as_json: print JSON.
    """
    if write is not None:
        console().print(f"wrote {len(write_pages(pages(plugins), write))} pages into {write}")
        return
    if name is None:
        _list_registered(by_family(passes(plugins).values()), as_json, "passes")
        return
    info = find_pass(plugins, name)
    facts = ""
    if issubclass(info.cls, RewritePass):
        merged = "yes" if merges(info.cls) else "no"
        numerics = with_defaults(info.cls).numerics
        facts = f"works on: {', '.join(info.cls.on)}   numerics: {numerics}   merges: {merged}"
    _show_registered(info, as_json, facts)


def show_objectives(plugins: Plugins, name: str | None, write: Path | None, as_json: bool) -> None:
    """Print all objectives, or one objective with its options; or write a reference page of each.

    Args:
        plugins: plugin manager that the objectives come from.
        name: objective to print with its options, None for the list.
        write: directory of the pages; nothing else is printed then.
        as_json: print JSON.
    """
    if write is not None:
        console().print(f"wrote {len(write_pages(objective_pages(plugins), write))} pages into {write}")
        return
    if name is None:
        found = sorted(objectives(plugins).values(), key=lambda i: i.name)
        _list_registered({"objectives": found}, as_json, "objectives")
        return
    info = find_objective(plugins, name)
    _show_registered(info, as_json, f"best checkpoint by: {info.cls.metric}")


def _list_registered(groups: Mapping[str, Sequence[Info[Any]]], as_json: bool, command: str) -> None:
    """Print registered classes under a title for each group, with their first lines.

    Args:
        groups: title -> classes.
        as_json: print JSON instead.
        command: command that shows the options of one of them.
    """
    if as_json:
        print_json(
            [
                {
                    "name": info.name,
                    "family": title,
                    "distribution": info.distribution,
                    "version": info.version,
                    "about": _first_line(info.cls),
                }
                for title, infos in groups.items()
                for info in infos
            ]
        )
        return
    out = console()
    names = {
        info: ", ".join((info.name, *getattr(info.cls, "aliases", ()))) for i in groups.values() for info in i
    }
    for title, infos in groups.items():
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(min_width=max(map(len, names.values())), no_wrap=True, style="cyan")
        table.add_column()
        for info in infos:
            about = Text(_first_line(info.cls))
            if info.distribution != CORE:
                about.append(f" (from {info.distribution} {info.version})", style="dim")
            table.add_row(names[info], about)
        out.print(Text(title, style="bold"))
        out.print(table)
        out.print()
    out.print(f"surgery {command} NAME shows one with its options.")


def _show_registered(info: Info[Any], as_json: bool, facts: str) -> None:
    options = describe_options(info.cls)
    if as_json:
        shown = {"name": info.name, "distribution": info.distribution, "options": options}
        print_json({**shown, "doc": info.cls.__doc__, "example": example_of(info.cls)})
        return
    out = console()
    out.print(Text(info.name, style="bold"), f"from {info.distribution} {info.version}")
    out.print(Text(inspect.cleandoc(info.cls.__doc__ or "")))
    if facts:
        out.print(facts)
    # Printed as they are: a line that is broken at the width of the terminal could not be copied.
    out.print(Text("Example:\n" + "\n".join(f"  {line}" for line in example_of(info.cls))), soft_wrap=True)
    table = Table("option", "type", "default", "", box=None, header_style="bold")
    for row in options:
        default = "-" if row["default"] in (None, "") else str(row["default"])
        table.add_row(
            row["option"], row["type"], "required" if row["required"] else default, row["description"]
        )
    out.print(table)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""
