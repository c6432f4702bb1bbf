"""Text and tables that several commands print."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from surgery.engine.change.selection import SelectPass
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.program import Program
from surgery.graph.sites import Site


def console() -> Console:
    """A console as wide as the terminal, or in a pipe as COLUMNS says: 200 without it, to keep paths on one line."""
    # Without markup: a bracket in a docstring, an option or a path is a bracket.
    wide = 200 if not sys.stdout.isatty() else 80
    width = max(shutil.get_terminal_size((wide, 24)).columns, 80)
    return Console(width=width, highlight=False, soft_wrap=False, markup=False)


def print_json(data: Any) -> None:
    """Print data as JSON, for other programs."""
    click.echo(json.dumps(data, indent=1, default=str))


def choices_table(choices: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of the quantized weights that a merge treated, from its journal entry.

    Args:
        choices: weight path -> treatment and errors, as `Choice.to_json` gives them.
    """
    table = Table("weight", "adapters", "error of", "new codes", "corrected", "lost of the adapters")
    for path, choice in choices.items():
        errors = choice["errors"]
        cells = [f"{errors[how]:.2%}" if how in errors else "" for how in ("requantize", "residual")]
        how = f"residual, rank {choice['rank']}" if choice["how"] == "residual" else choice["how"]
        lost = f"{choice['lost']:.1%}" if choice["how"] != "keep" else "nothing"
        if choice["how"] != "keep" and choice.get("unseen"):
            lost += f", {choice['unseen']:.1%} where no data go"
        table.add_row(path, how, choice["of"] if errors else "", *cells, lost)
    return table


def trainable_line(program: Program) -> str:
    """Parameters of a program: all, trainable, and the trainable share."""
    total, trainable = program.count_parameters()
    share = 100 * trainable / total if total else 0.0
    return f"{total:,} parameters, {trainable:,} trainable ({share:.2f}%)"


def note_unfrozen(out: Console, passes: Sequence[Pass], freeze_base: bool | None) -> None:
    """Print a note if the base stays trainable because a pass of the user selects what trains.

    Args:
        out: console.
        passes: the applied passes.
        freeze_base: value of --freeze-base, None if it was not given.
    """
    selections = [p for p in passes if isinstance(p, SelectPass)]
    settled = any(p.exclusive for p in selections)
    selects = next((p.name for p in selections), None) if not settled else None
    if selects and freeze_base is None and any(isinstance(p, RewritePass) for p in passes):
        out.print(
            f"note: --pass {selects} selects what trains, so the rest of the base stays trainable; "
            f"add --freeze-base to freeze it first",
            style="yellow",
        )


def site_row(program: Program, site: Site) -> dict[str, Any]:
    """The facts about a site, JSON-able."""
    return {
        "path": site.path,
        "role": site.role,
        "cross": site.cross,
        "kind": site.kind,
        "op": site.op,
        "weight": site.weight,
        "bias": site.bias,
        "shape": list(site.shape),
        "layout": site.layout,
        "dtype": str(site.dtype).removeprefix("torch."),
        "parameters": site.parameters,
        "trainable": bool(site.weight) and program.trains(str(site.weight)),
        "tied": list(site.tied),
        "calls": len(site.calls),
        "parts": {name: len(rows) for name, rows in site.parts.items()},
        "computed_from": list(site.computed_from),
    }
