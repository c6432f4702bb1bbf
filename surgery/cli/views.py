"""Views of what exists: a program's sites, the registered passes and objectives, a plan, a difference."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from surgery.cli.families import by_family
from surgery.cli.recipe import Recipe
from surgery.cli.reference import objective_pages, pages, write_pages
from surgery.cli.render import console, count, note_unfrozen, print_json, site_row, trainable_line
from surgery.common.options import describe_options
from surgery.common.plugins import CORE, Info, Plugins
from surgery.engine.change.plans import PassPlan, PlanReport, SitePlan
from surgery.engine.change.selection import in_words
from surgery.engine.contract.base import GraphPass, RewritePass, merges, with_defaults
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.diff import diff
from surgery.engine.program import Program
from surgery.engine.registry import find_pass, passes
from surgery.engine.state import trained_values
from surgery.graph.sites import Site
from surgery.graph.unread import unread_weights
from surgery.train.registry import find_objective, objectives

# -- a program


def show_program(program: Program, title: str, as_json: bool) -> None:
    """Print the sites of a program as a tree, its parameters and the applied passes.

    Args:
        program: program to print.
        title: root of the tree.
        as_json: print JSON instead.
    """
    sites = program.sites.sites
    unread = unread_weights(program.view)
    if as_json:
        total, trainable = program.count_parameters()
        rows = [site_row(program, site) for site in sites]
        facts = {"model": title, "parameters": total, "trainable": trainable}
        print_json({**facts, "notes": list(program.captured.notes), "sites": rows, "no_site": unread})
        return
    tree = Tree(Text(title, style="bold"))
    branches: dict[str, Tree] = {"": tree}
    for site in sites:
        owner, _, leaf = site.path.rpartition(".")
        _branch(branches, owner).add(_site_text(program, site, leaf))
    out = console()
    out.print(tree)
    for name, op in unread.items():
        out.print(
            Text(
                f"no site: {name}, read by {op} (only selections such as --pass full reach it)",
                style="yellow",
            )
        )
    out.print(trainable_line(program))
    for output, names in program.labels.items():
        out.print(Text(f"  classes of {output}: {', '.join(names)}"))
    for entry in program.journal:
        where = in_words(entry, program.tensors) if entry.kind == "select" else f"on {len(entry.sites)} sites"
        if entry.weight == 1:
            scaled = ""
        elif entry.weight == 0:
            scaled = ", left out"
        else:
            scaled = f", at weight {entry.weight:g}"
        out.print(f"  applied: {entry.id} {where}{scaled}")


def _branch(branches: dict[str, Tree], path: str) -> Tree:
    """The branch of a module path; missing ones are added to `branches` and to the tree."""
    if path not in branches:
        owner, _, leaf = path.rpartition(".")
        branches[path] = _branch(branches, owner).add(Text(leaf, style="cyan"))
    return branches[path]


def _site_text(program: Program, site: Site, leaf: str) -> Text:
    row = site_row(program, site)
    text = Text(leaf, style="bold")
    text.append(f"  {row['role'] or '-'}", style="green")
    text.append(f"  {row['op']}", style="dim")
    text.append(f"  {'×'.join(map(str, row['shape']))} {row['dtype']}  {count(row['parameters'])}")
    text.append("  trains" if row["trainable"] else "  frozen", style="" if row["trainable"] else "blue")
    if row["calls"] > 1:
        text.append(f"  called {row['calls']} times", style="yellow")
    if row["tied"]:
        text.append(f"  tied to {', '.join(row['tied'])}", style="yellow")
    if row["computed_from"]:
        text.append(f"  computed from {', '.join(row['computed_from'])}", style="yellow")
    return text


# -- registered passes and objectives


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
        print_json({**shown, "doc": info.cls.__doc__})
        return
    out = console()
    out.print(Text(info.name, style="bold"), f"from {info.distribution} {info.version}")
    out.print(Text(inspect.cleandoc(info.cls.__doc__ or "")))
    if facts:
        out.print(facts)
    table = Table("option", "type", "default", "", box=None, header_style="bold")
    for row in options:
        default = "-" if row["default"] in (None, "") else str(row["default"])
        table.add_row(
            row["option"], row["type"], "required" if row["required"] else default, row["description"]
        )
    out.print(table)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


# -- a plan


def show_plan(program: Program, report: PlanReport, wanted: Recipe, why: bool, as_json: bool) -> None:
    """Print a plan: each pass with its sites, and the parameters that would train.

    Args:
        program: program that the plan is for.
        report: the plan.
        wanted: passes and --freeze-base of the command line.
        why: list near misses of patterns.
        as_json: print JSON.
    """
    if as_json:
        print_json([_plan_json(p, why) for p in report.passes])
        return
    out = console()
    for planned in report.passes:
        out.print(_plan_title(planned))
        if planned.sites:
            out.print(_sites_table(planned))
        for sentence in planned.notes:
            out.print(Text(f"  note: {sentence}", style="yellow"))
        if why:
            _print_misses(out, planned)
    note_unfrozen(out, wanted.passes, wanted.freeze_base)
    sizes = program.parameter_sizes()
    freed = sum(sizes.get(name, 0) for name in _freed(program, report.passes))
    out.print(
        trainable_line(program)
        + f"; the plan adds {count(sum(p.parameters for p in report.passes))}"
        + (f" and leaves out {count(freed)}" if freed else "")
        + ", and then "
        + f"{_trainable_after(program, report):,} train"
    )


def _sites_table(planned: PassPlan) -> Table:
    table = Table("site", "role", "weight", "adds", "note", box=None, header_style="bold", padding=(0, 1))
    for row in planned.sites:
        if row.refusal:
            note = Text(f"refused: {row.refusal}", style="red")
        else:
            note = Text(_note(planned.pass_, row), style="yellow")
        # The site of a pattern has no weight but the shape of a value, whose dynamic sizes are symbols.
        shape = "×".join(str(size) if isinstance(size, int) else "…" for size in row.site.shape)
        added = "" if row.refusal else count(row.parameters)
        table.add_row(row.site.path, row.site.role, shape, added, note)
    return table


def _freed(program: Program, passes: Sequence[PassPlan]) -> set[str]:
    """Parameters that the program no longer reads after the passes, by the names of `parameter_sizes`."""
    return {program.names.get(name, (name,))[0] for planned in passes for name in planned.freed}


def _trainable_after(program: Program, report: PlanReport) -> int:
    """Number of trainable values after the plan. Masked values of a parameter do not count."""
    trains: dict[str, bool] = {}
    masks = {name: program.tensors[mask] for name, mask in program.schedule.masks.items()}
    for planned in report.passes:
        trains.update(planned.trains)
        # The last selection that names a parameter wins, so its masks replace earlier ones.
        masks = {name: mask for name, mask in masks.items() if name not in planned.trains}
        masks.update(planned.selection.masks)
    sizes, freed = program.parameter_sizes(), _freed(program, report.passes)
    kept = sum(
        trained_values(n, masks.get(k))
        for k, n in sizes.items()
        if k not in freed and trains.get(k, program.trains(k))
    )
    return kept + sum(planned.parameters for planned in report.passes)


def _plan_title(planned: PassPlan) -> Text:
    text = Text(planned.pass_.entry_id, style="bold")
    if planned.auto:
        text.append("  (added by the pipeline; --no-freeze-base leaves it out)", style="dim")
    if planned.sites:
        text.append(f"  {len(planned.accepted)} sites, {count(planned.parameters)} parameters added")
        if planned.refused:
            text.append(f", {len(planned.refused)} refused", style="red")
        if planned.trains:
            text.append(f"; of the base {in_words(planned.selection, {})}")
    elif isinstance(planned.pass_, PatternPass):
        near = f"; {len(planned.misses)} near misses, which --why lists" if planned.misses else ""
        text.append(f"  its pattern is nowhere in this model{near}", style="red")
    else:
        text.append(f"  {in_words(planned.selection, {})}")
    return text


def _note(pass_: Any, row: SitePlan) -> str:
    note = pass_.outcome(row.site).note if row.specs else ""
    notes = [note] if note else []
    if row.site.tied:
        notes.append(f"tied to {', '.join(row.site.tied)}")
    if len(row.site.calls) > 1 and not isinstance(pass_, GraphPass):
        notes.append(f"called {len(row.site.calls)} times, one adapter")
    if row.site.decided.get("rows"):
        notes.append(f"parts {', '.join(row.site.decided['rows'])}")
    numbers = {k: v for k, v in row.site.decided.items() if type(v) in (int, float)}
    notes.extend(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
    return "; ".join(notes)


def _print_misses(out: Console, planned: PassPlan) -> None:
    for miss in planned.misses:
        out.print(
            Text("  not at ", style="yellow")
            .append(miss.path or miss.anchor.name, style="bold")
            .append(f": {miss}")
        )
    if not planned.misses:
        out.print(Text("  no near misses", style="dim"))


def _plan_json(planned: PassPlan, why: bool) -> dict[str, Any]:
    near = [
        {"path": m.path, "node": m.node.name, "reason": m.reason, "matched": m.matched}
        for m in planned.misses
    ]
    return {
        "pass": planned.pass_.name,
        "id": planned.pass_.entry_id,
        "options": planned.pass_.options(),
        "auto": planned.auto,
        "parameters_added": planned.parameters,
        "left_out": sorted(planned.freed),
        "sites": [
            {
                "path": row.site.path,
                "role": row.site.role,
                "kind": row.site.kind,
                "shape": [size if isinstance(size, int) else None for size in row.site.shape],
                "tied": list(row.site.tied),
                "refusal": row.refusal,
                "decided": dict(row.site.decided),
                "tensors": {name: list(spec.shape) for name, spec in row.specs.items()},
                "parameters_added": row.parameters,
            }
            for row in planned.sites
        ],
        "trains": planned.trains,
        "rates": planned.selection.rates,
        "windows": planned.selection.windows,
        "unit": planned.selection.unit,
        "masked": {n: float(m.float().mean()) for n, m in planned.selection.masks.items()},
        "notes": list(planned.notes),
        **({"near_misses": near} if why else {}),
    }


# -- a difference


def show_diff(a: Program, b: Program, as_json: bool) -> None:
    """Print the nodes and weights that differ between two programs.

    Args:
        a: first program.
        b: second program.
        as_json: print JSON.
    """
    found = diff(a, b)
    if as_json:
        print_json(
            {"nodes": [vars(n) for n in found.nodes], "weights": list(found.weights), "total": found.total}
        )
        return
    out = console()
    table = Table("", "node", "op", "module", "shape", "by", box=None, header_style="bold", padding=(0, 1))
    style = {"+": "green", "-": "red", "~": "yellow"}
    for n in found.nodes:
        rewired = f"{n.node}  ({n.was} → {n.now})" if n.change == "~" else n.node
        table.add_row(n.change, rewired, n.op, n.module, n.shape, n.by, style=style[n.change])
    if found.nodes:
        out.print(table)
    tally = {c: sum(n.change == c for n in found.nodes) for c in "+-~"}
    out.print(
        f"{found.total[0]} → {found.total[1]} nodes: {tally['+']} added, {tally['-']} removed, {tally['~']} rewired; "
        f"{len(found.weights)} weights differ"
    )
    for name in found.weights[:20]:
        out.print(f"  weight {name}")
    if len(found.weights) > 20:
        out.print(f"  … and {len(found.weights) - 20} more (--json lists all)")
