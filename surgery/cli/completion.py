"""Shell completion of passes, objectives, their options and values, roles, and the adapters of a saved directory.

Completion must not import torch, so the built-in names are in completion.json, which `make docs` writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

TABLE = Path(__file__).with_name("completion.json")
_LARGEST = 50_000_000  # bytes of a manifest that completion reads


@cache
def table() -> dict[str, Any]:
    """The built-in names: "--pass" and "--objective" -> name -> option -> its values, and "roles"."""
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def matching(names: Sequence[str], incomplete: str) -> list[CompletionItem]:
    """The names that begin with a text."""
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def in_group(flag: str, args: Sequence[str], incomplete: str) -> list[CompletionItem] | None:
    """Completions behind `--pass NAME …`.

    Args:
        flag: Option that starts a group, such as "--pass".
        args: Complete arguments before the cursor.
        incomplete: Text at the cursor.

    Returns:
        Options of the last group, or values of its last option; None if the command's own completion applies.
    """
    starts = [i for i, text in enumerate(args) if text == flag]
    if not starts or starts[-1] + 1 >= len(args):
        return None
    options: dict[str, list[str]] = table()[flag].get(args[starts[-1] + 1], {})
    last = args[-1]
    if not incomplete.startswith("-") and last in options:
        if last == "--target":
            head, comma, term = incomplete.rpartition(",")
            return [CompletionItem(f"{head}{comma}{item.value}") for item in matching(table()["roles"], term)]
        if options[last]:
            return matching(options[last], incomplete)
        return None
    return matching(list(options), incomplete) if incomplete.startswith("-") else None


def complete_adapters(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The adapters of the saved directory that stands on the line; with "=" behind them where a weight follows."""
    # The option at the cursor has no value yet, and click then leaves the arguments before it in `ctx.args`.
    given = [*ctx.args, ctx.params.get("directory"), ctx.params.get("model")]
    found = (Path(str(text)) / "surgery.json" for text in given if text)
    manifest = next((path for path in found if path.is_file()), None)
    try:
        if manifest is None or manifest.stat().st_size > _LARGEST:
            return []
        journal = json.loads(manifest.read_text())["journal"]
        names = [str(entry["id"]) for entry in journal]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    weighted = (param.metavar or "").endswith("=W")
    shown = [f"{name}=" if weighted else name for name in names if name.isprintable()]
    return matching(shown, incomplete)
