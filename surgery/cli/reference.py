"""Markdown reference pages of passes and objectives, from their docstrings and options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.cli.families import by_family
from surgery.common.files import write_text
from surgery.common.options import Configured, describe_options
from surgery.common.plugins import Info, Plugins
from surgery.engine.change.selection import SelectPass
from surgery.engine.contract.base import GraphPass, Pass, RewritePass, merges, with_defaults
from surgery.engine.registry import PassInfo, passes
from surgery.train.registry import ObjectiveInfo, objectives


def page(info: PassInfo) -> str:
    """The reference page of a pass, with the same facts as `surgery passes NAME`."""
    cls = info.cls
    facts = []
    if issubclass(cls, SelectPass):
        facts.append("It selects what trains and changes no graph.")
    elif issubclass(cls, RewritePass):
        where = (
            "on places of the whole program"
            if issubclass(cls, GraphPass)
            else f"on {', '.join(cls.on)} weights"
        )
        default = f", by default `{cls.default_target}`" if cls.default_target else ""
        usual = with_defaults(cls)
        facts.append(f"It acts {where}{default}. At insertion: {usual.numerics}.")
        facts.append("It merges into the base." if merges(cls) else "It stays when a program is merged.")
        if usual.effect.scalable:
            facts.append("It can be weighted.")
    for word, names in (("Needs", cls.requires), ("Comes before", cls.before)):
        if names:
            facts.append(f"{word} {', '.join(f'`{name}`' for name in names)}.")
    return _page(info, facts)


def objective_page(info: ObjectiveInfo) -> str:
    """The reference page of an objective, with the same facts as `surgery objectives NAME`."""
    cls = info.cls
    facts = [f"The best checkpoint is that of the {'largest' if cls.larger else 'smallest'} {cls.metric}."]
    if cls.guesses:
        guessed = "; ".join(
            f"`--{option.replace('_', '-')}`: {', '.join(names)}" for option, names in cls.guesses.items()
        )
        facts.append(f"Columns that are looked for where none is named: {guessed}.")
    return _page(info, facts)


def example_of(cls: type[Configured]) -> list[str]:
    """Command lines that use a pass or an objective: its own example, or one of its name and required options."""
    if cls.example:
        return cls.example.splitlines()
    given = [
        f"{row['option']} {row['option'][2:].upper()}" for row in describe_options(cls) if row["required"]
    ]
    if not issubclass(cls, Pass):
        return [" ".join(["surgery train MODEL --objective", cls.name, *given, "--data FILE -o trained/"])]
    targeted = issubclass(cls, GraphPass) or getattr(cls, "default_target", None) is not None
    target = [] if targeted else ["--target all"]
    return [" ".join(["surgery apply MODEL --pass", cls.name, *target, *given, "-o changed/"])]


def _page(info: Info[Any], facts: Sequence[str]) -> str:
    lines = [f"# {info.name}", "", inspect.cleandoc(info.cls.__doc__ or ""), ""]
    lines += [" ".join([f"From `{info.distribution}`.", *facts]), ""]
    lines += ["Example:", "", *(f"    {line}" for line in example_of(info.cls)), ""]
    lines += ["| option | type | default | |", "|---|---|---|---|"]
    for row in describe_options(info.cls):
        default = (
            "required" if row["required"] else "" if row["default"] in (None, "") else f"`{row['default']}`"
        )
        lines.append(
            f"| `{row['option']}` | {_escape(row['type'])} | {default} | {_escape(row['description'])} |"
        )
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return re.sub(r"\|", r"\\|", str(text))


def _index(title: str, groups: Mapping[str, Iterable[Info[Any]]]) -> str:
    """An index page: name, link and first sentence of each registered class, under a heading for each group."""
    rows = [f"# {title}", "", "Written by `make docs` from the docstrings."]
    for heading, infos in groups.items():
        rows += ["", f"## {heading[0].upper()}{heading[1:]}", ""] if heading else [""]
        rows += [_index_row(info) for info in infos]
    return "\n".join(rows) + "\n"


def _index_row(info: Info[Any]) -> str:
    paragraph = inspect.cleandoc(info.cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    first = re.split(r"(?<=[^l]\.) (?=[A-Z`])", paragraph)[0]  # do not split after "et al."
    return f"- [`{info.name}`]({info.name}.md): {first}"


def pages(plugins: Plugins) -> dict[str, str]:
    """File name -> page, for every pass and for the index."""
    found = {f"{info.name}.md": page(info) for info in passes(plugins).values()}
    return {"README.md": _index("Passes", by_family(passes(plugins).values())), **found}


def objective_pages(plugins: Plugins) -> dict[str, str]:
    """File name -> page, for every objective and for the index."""
    found = {f"{info.name}.md": objective_page(info) for info in objectives(plugins).values()}
    return {
        "README.md": _index("Objectives", {"": sorted(objectives(plugins).values(), key=lambda i: i.name)}),
        **found,
    }


def write_pages(made: Mapping[str, str], folder: Path) -> list[Path]:
    """Write pages into a directory and return their paths. Raises SurgeryError if a page cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        write_text(folder / name, text)
    return [folder / name for name in made]
