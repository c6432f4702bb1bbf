"""A page of reference for each pass, in Markdown, from its docstring and its options."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from surgery.files import write_text
from surgery.pass_base import GraphPass, RewritePass, SelectPass
from surgery.pipeline import describe_options
from surgery.plugins import PassInfo, Plugins


def page(info: PassInfo) -> str:
    """What `surgery passes NAME` says, as a page."""
    cls = info.cls
    lines = [f"# {info.name}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
    facts = [f"From `{info.distribution}`."]
    if issubclass(cls, SelectPass):
        facts.append("It selects what trains and changes no graph.")
    elif issubclass(cls, RewritePass):
        where = (
            "on places of the whole program"
            if issubclass(cls, GraphPass)
            else f"on {', '.join(cls.on)} weights"
        )
        default = f", by default `{cls.default_target}`" if cls.default_target else ""
        facts.append(f"It acts {where}{default}. At insertion: {cls.numerics}.")
        facts.append("It merges into the base." if cls.mergeable else "It stays when a program is merged.")
        if cls.weightable:
            facts.append("It can be weighted.")
    for word, names in (("Needs", cls.requires), ("Comes before", cls.before)):
        if names:
            facts.append(f"{word} {', '.join(f'`{name}`' for name in names)}.")
    facts += [f"Not with `{name}`: {why}." for name, why in cls.conflicts.items()]
    lines += [" ".join(facts), "", "| option | type | default | |", "|---|---|---|---|"]
    for row in describe_options(cls):
        default = (
            "required" if row["required"] else "" if row["default"] in (None, "") else f"`{row['default']}`"
        )
        lines.append(
            f"| `{row['option']}` | {_escape(row['type'])} | {default} | {_escape(row['description'])} |"
        )
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return re.sub(r"\|", r"\\|", str(text))


def index(plugins: Plugins) -> str:
    """The list of passes, with the first sentence of each."""
    rows = ["# Passes", "", "Written by `make docs` from the docstrings.", ""]
    for info in sorted(plugins.passes.values(), key=lambda i: i.name):
        paragraph = inspect.cleandoc(info.cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        first = re.split(r"(?<=[^l]\.) (?=[A-Z`])", paragraph)[0]  # not behind "et al."
        rows.append(f"- [`{info.name}`]({info.name}.md): {first}")
    return "\n".join(rows) + "\n"


def pages(plugins: Plugins) -> dict[str, str]:
    """Every page by file name."""
    found = {f"{info.name}.md": page(info) for info in plugins.passes.values()}
    return {"README.md": index(plugins), **found}


def write_pages(plugins: Plugins, folder: Path) -> list[Path]:
    """Write every page into a folder. Raises SurgeryError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages(plugins).items():
        write_text(folder / name, text)
    return [folder / name for name in pages(plugins)]
