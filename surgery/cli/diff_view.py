"""`surgery diff`: nodes and weights that differ, by module, with folded blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery.cli.render import console, print_json
from surgery.common.folding import Folding, Row, selected, times
from surgery.common.quantities import count
from surgery.engine.diff import NodeChange, diff
from surgery.engine.program import Program
from surgery.engine.replaced import replaced_weights

_STYLE = {"+": "green", "-": "red", "~": "yellow"}


def show_diff(a: Program, b: Program, as_json: bool, folding: Folding) -> None:
    """Print the nodes and weights that differ between two programs.

    Args:
        a: first program.
        b: second program.
        as_json: print JSON, which lists every node.
        folding: nodes to show, and how deep.
    """
    found = diff(a, b)
    if as_json:
        print_json(
            {"nodes": [vars(n) for n in found.nodes], "weights": list(found.weights), "total": found.total}
        )
        return
    out = console()
    roles = {site.path: site.role for program in (b, a) for site in program.sites}
    rows = [_row(change) for change in found.nodes]
    rows = selected(rows, [_role(row.path, roles) for row in rows], folding.role)
    if rows:
        out.print(_nodes_table(rows, folding))
    tally = Counter(n.change for n in found.nodes)
    out.print(
        f"{found.total[0]} → {found.total[1]} nodes: {tally['+']} added, {tally['-']} removed, {tally['~']} rewired; "
        f"{len(found.weights)} weights differ"
    )
    _print_weights(out, found.weights, roles, folding)
    _print_sizes(out, a, b)


def _row(change: NodeChange) -> Row:
    """A changed node at its module; a tensor of a pass lies at the module of its site."""
    path = change.module
    if change.op == "get_attr" and change.by:
        path = path.partition(f".{change.by}.")[0]
    elif change.op == "get_attr":
        path = path.rpartition(".")[0]
    name = change.module[len(path) :].lstrip(".")
    return Row(path, (change.change, change.op, name, change.shape, change.by), change)


def _role(path: str, roles: Mapping[str, str]) -> str:
    """Role of the site at a path or above it."""
    while path and path not in roles:
        path = path.rpartition(".")[0]
    return roles.get(path, "")


def _nodes_table(rows: Iterable[Row], folding: Folding) -> Table:
    table = Table("", "node", "shape", "by", box=None, header_style="bold", padding=(0, 1))
    table.columns[1].overflow = "fold"
    table.columns[2].no_wrap = table.columns[3].no_wrap = True
    for path, places, item in folding.tree(rows).lines():
        table.add_row("", Text(path or "the model", style="bold").append(times(places), style="cyan"))
        if item.cut:
            tally = Counter(row.value.change for row in item.below)
            table.add_row("", "  " + ", ".join(f"{kind}{tally[kind]}" for kind in "+-~" if tally[kind]))
            continue
        for row in item.rows:
            change, op, name, shape, by = row.alike
            said = f"  {name or op.removeprefix('aten.')}"
            if change == "~":
                said += f"  ({_rewired(row.value)})"
            table.add_row(change, said, shape, by, style=_STYLE[change])
    return table


def _rewired(change: NodeChange) -> str:
    """The inputs of a node that are other ones now."""
    was, now = change.was.split(", "), change.now.split(", ")
    if len(was) != len(now):
        return f"{change.was} → {change.now}"
    pairs = [f"{one} → {other}" for one, other in zip(was, now, strict=True) if one != other]
    return ", ".join(pairs) or "an input is another op of this name"


def _print_weights(out: Console, weights: Iterable[str], roles: Mapping[str, str], folding: Folding) -> None:
    """Print the weights that differ, by module."""
    rows = [Row(name.rpartition(".")[0], name.rpartition(".")[2], name) for name in weights]
    rows = selected(rows, [_role(row.path, roles) for row in rows], folding.role)
    shown = 0
    lines = list(folding.tree(rows).lines())
    for path, places, item in lines if folding.all else lines[:20]:
        names = "…" if item.cut else ", ".join(row.value.rpartition(".")[2] for row in item.rows)
        out.print(
            Text(f"  weight {path}.{names}".replace("weight .", "weight ")).append(
                times(places), style="cyan"
            )
        )
        shown += len(item.below) if item.cut else len(item.rows) * places
    if shown < len(rows):
        out.print(f"  … and {len(rows) - shown} more (--all lists all)")


def _print_sizes(out: Console, a: Program, b: Program) -> None:
    """Print the number of parameters, if it changed, and what passes of B replaced."""
    known = {str(each) for each in replaced_weights(a)}
    for each in replaced_weights(b):
        if str(each) not in known:
            out.print(f"  {each.entry}: {each}")
    before, after = (p.count_parameters()[0] + _packed(p) for p in (a, b))
    packed = f", {count(_packed(b))} of them as codes" if _packed(b) else ""
    if after < before:
        out.print(f"parameters: {count(after)} of {count(before)} left{packed}")
    elif after > before or packed:
        out.print(f"parameters: {count(before)} → {count(after)}{packed}")


def _packed(program: Program) -> int:
    """Number of values that codes replace; they are not parameters any more."""
    return sum(each.before for each in replaced_weights(program) if each.packed)
