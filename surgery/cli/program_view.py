"""`surgery inspect`: the sites of a program as a tree with folded blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from surgery.capture.dimensions import Dimensions
from surgery.cli.render import console, print_json, site_row, trainable_line
from surgery.common.folding import Folded, Folding, Row, selected, times
from surgery.common.quantities import count
from surgery.engine.contract.selection import in_words
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.replaced import replaced_weights
from surgery.graph.outputs import named_outputs
from surgery.graph.sites import Site, SiteKey
from surgery.graph.unread import unread_weights


def show_program(program: Program, title: str, as_json: bool, folding: Folding) -> None:
    """Print the sites of a program as a tree, its inputs and outputs, its parameters and the applied passes.

    Args:
        program: program to print.
        title: root of the tree.
        as_json: print JSON instead, which lists every site.
        folding: sites to show, and how deep.
    """
    unread = unread_weights(program.view)
    sites = program.sites.sites
    rows = [Row(site.path, (), (site, site_row(program, site))) for site in sites]
    passes = adapters_at(program.journal.entries)
    rows = [Row(row.path, _alike(row.value[1], passes.get(row.value[0].key, [])), row.value) for row in rows]
    rows = selected(rows, [site.role for site in sites], folding.role)
    if as_json:
        total, trainable = program.count_parameters()
        facts = {"model": title, "parameters": total, "trainable": trainable}
        listed = [row.value[1] for row in rows]
        print_json({**facts, "notes": list(program.captured.notes), "sites": listed, "no_site": unread})
        return
    tree = Tree(Text(title, style="bold"))
    shown = folding.tree(rows)
    for row in shown.rows:
        tree.add(_site_text(row.value[0], row.value[1], passes))
    if shown.cut:
        tree.add(Text(_summary(shown, passes).strip(), style="dim"))
    _add(tree, shown, passes)
    out = console()
    out.print(tree)
    if folding.role and not rows:
        roles = ", ".join(sorted({site.role for site in sites if site.role}))
        out.print(
            Text(f"no site has a role like {folding.role}; the roles are {roles or 'none'}", style="red")
        )
    _print_unread(out, unread, folding)
    _print_ends(out, program)
    out.print(trainable_line(program))
    for each in replaced_weights(program):
        out.print(f"  {each.entry}: {each}")
    for output, names in program.labels.items():
        out.print(Text(f"  classes of {output}: {', '.join(names)}"))
    for entry in program.journal:
        where = in_words(entry, program.tensors) if entry.kind == "select" else f"on {len(entry.sites)} sites"
        out.print(f"  applied: {entry.id} {where}{_scaled(entry)}")


def adapters_at(entries: Sequence[Entry]) -> dict[SiteKey, list[str]]:
    """Passes applied at each site: `lora`, or `lora at weight 0.5`."""
    found: dict[SiteKey, list[str]] = {}
    for entry in entries:
        if entry.kind == "rewrite":
            for record in entry.sites:
                found.setdefault(record.key, []).append(entry.id + _scaled(entry).replace(",", ""))
    return found


def _scaled(entry: Entry) -> str:
    if entry.weight == 1:
        return ""
    return ", left out" if entry.weight == 0 else f", at weight {entry.weight:g}"


def _alike(row: dict[str, Any], passes: list[str]) -> Any:
    named = {
        key: row[key]
        for key in ("role", "cross", "op", "shape", "dtype", "trainable", "calls", "layout", "bias")
    }
    named["bias"] = bool(named["bias"])
    several = bool(row["tied"]), len(row["computed_from"]), sorted(row["parts"].items())
    return str((named, several, passes))


def _add(branch: Tree, item: Folded, passes: dict[SiteKey, list[str]]) -> None:
    """Add the rows of a module and of those below it to a tree."""
    for child in item.children:
        texts = [_site_text(row.value[0], row.value[1], passes) for row in child.rows]
        if len(texts) == 1 and not child.cut:
            head = Text(child.name, style="bold").append(times(child.count), style="cyan").append(texts[0])
            inner = branch.add(head)
        else:
            head = Text(child.name, style="cyan").append(times(child.count), style="bold cyan")
            head.append(_summary(child, passes), style="dim")
            inner = branch.add(head)
            for text in texts if not child.cut else ():
                inner.add(text)
        _add(inner, child, passes)


def _summary(item: Folded, passes: dict[SiteKey, list[str]]) -> str:
    """Contents of a module that stands for several or is not opened; whether its weights train, and its adapters."""
    if item.count == 1 and not item.cut:
        return ""
    sites = [row.value[0] for row in item.below]
    # A weight that several sites read, such as a tied one, counts once.
    sizes = {str(site.weight or site.key): site.parameters for site in sites}
    trains = [bool(row.value[1]["trainable"]) for row in item.below]
    state = "trains" if all(trains) else "trains in part" if any(trains) else "frozen"
    if not sites:
        return f"  {count(0)} in 0 sites"
    # An opened module shows the adapters at its sites.
    adapters = dict.fromkeys(name for site in sites for name in passes.get(site.key, ()) if item.cut)
    state = "  ".join([state, *(f"+{name}" for name in adapters)])
    return f"  {count(sum(sizes.values()))} in {len(sites)} sites  {state}"


def _site_text(site: Site, row: dict[str, Any], passes: dict[SiteKey, list[str]]) -> Text:
    text = Text(f"  {site.shown_role or '-'}", style="green")
    op = row["op"].removeprefix("aten.").partition(".")[0]
    if not row["role"] or not op.startswith(site.kind):
        text.append(f"  {op}", style="dim")
    shape, dtype = "×".join(map(str, row["shape"])), row["dtype"].replace("float", "f")
    text.append(f"  {shape} {dtype}  {count(row['parameters'])}", style="default")
    text.append("  trains" if row["trainable"] else "  frozen", style="" if row["trainable"] else "blue")
    if passes.get(site.key):
        text.append(f"  +{', +'.join(passes[site.key])}", style="magenta")
    if row["calls"] > 1:
        text.append(f"  called {row['calls']} times", style="yellow")
    if row["tied"]:
        text.append(f"  tied to {', '.join(row['tied'])}", style="yellow")
    if row["computed_from"]:
        text.append(f"  computed from {', '.join(row['computed_from'])}", style="yellow")
    return text


def _print_unread(out: Console, unread: Mapping[str, str], folding: Folding) -> None:
    """Print the weights that no site reads; roles do not reach them."""
    rows = [Row(name, op, op) for name, op in unread.items()]
    if not rows or folding.role:
        return
    out.print(Text("no site, so only selections such as --pass full reach them:", style="yellow"))
    for path, places, item in Folding(all=folding.all).tree(rows).lines():
        out.print(Text(f"  {path}{times(places)}, read by {item.rows[0].value}", style="yellow"))


def _print_ends(out: Console, program: Program) -> None:
    """Print the inputs and outputs with their named dimensions."""
    named = Dimensions(program.captured)

    def shape(value: Any) -> str:
        return f"[{named.shape(value.shape)}] {str(value.dtype).removeprefix('torch.')}"

    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    values = [(str(n.target), n.meta.get("val")) for n in inputs]
    tensors = [f"{name}{shape(value)}" for name, value in values if isinstance(value, torch.Tensor)]
    out.print(Text(f"inputs: {', '.join(tensors)}"))
    results = [
        f"{name}{shape(node.meta['val'])}"
        for name, node in named_outputs(program.graph).items()
        if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    out.print(Text(f"outputs: {', '.join(results)}"))
