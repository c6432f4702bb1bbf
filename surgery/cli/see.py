"""Commands that look and change nothing: inspect, passes, plan, diff."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from surgery.cli.data import data_option, read_data
from surgery.cli.options import json_option, model_options
from surgery.cli.pass_groups import PassCommand, parse_groups
from surgery.cli.recipe import Recipe, read_recipe
from surgery.cli.reference import pages, write_pages
from surgery.cli.render import console, count, note_unfrozen, site_row, trainable_line
from surgery.common.errors import SurgeryError
from surgery.common.options import describe_options
from surgery.common.plugins import Info, Plugins
from surgery.engine import registry
from surgery.engine.change.plans import PassPlan, PlanReport
from surgery.engine.change.selection import in_words
from surgery.engine.contract.base import GraphPass, RewritePass
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.diff import diff as diff_programs
from surgery.engine.program import Program
from surgery.engine.registry import find_pass
from surgery.engine.state import trained_values


@click.command()
@click.argument("model")
@json_option
@model_options
def inspect(model: str, as_json: bool, plugins: Plugins, loader: Callable[..., Program]) -> None:
    """Print the model as a tree of sites: role, op, weight, trainable or not, ties."""
    program = loader(model)
    sites = program.sites.sites
    if as_json:
        total, trainable = program.count_parameters()
        rows = [site_row(program, site) for site in sites]
        facts = {"model": model, "parameters": total, "trainable": trainable}
        _print_json({**facts, "notes": list(program.captured.notes), "sites": rows})
        return
    tree = Tree(Text(model, style="bold"))
    branches: dict[str, Tree] = {"": tree}
    for site in sites:
        owner, _, leaf = site.path.rpartition(".")
        parent = _branch(branches, owner)
        parent.add(_site_text(program, site, leaf))
    out = console()
    out.print(tree)
    out.print(trainable_line(program))
    for entry in program.journal:
        said = in_words(entry, program.tensors) if entry.kind == "select" else f"on {len(entry.sites)} sites"
        scaled = (
            ""
            if entry.weight == 1
            else ", left out"
            if entry.weight == 0
            else f", at weight {entry.weight:g}"
        )
        out.print(f"  applied: {entry.id} {said}{scaled}")


def _branch(branches: dict[str, Tree], path: str) -> Tree:
    if path not in branches:
        owner, _, leaf = path.rpartition(".")
        branches[path] = _branch(branches, owner).add(Text(leaf, style="cyan"))
    return branches[path]


def _site_text(program: Program, site: Any, leaf: str) -> Text:
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


write_option = click.option(
    "--write", type=click.Path(path_type=Path), metavar="DIR", help="Write a page of reference for each."
)


@click.command()
@click.argument("name", required=False)
@write_option
@json_option
@click.pass_obj
def passes(plugins: Plugins, name: str | None, write: Path | None, as_json: bool) -> None:
    """List passes with the distribution each comes from, or one pass's options."""
    if write is not None:
        console().print(f"wrote {len(write_pages(pages(plugins), write))} pages into {write}")
        return
    if name is None:
        list_registered(registry.passes(plugins), "pass", as_json)
        return
    info = find_pass(plugins, name)
    facts = ""
    if issubclass(info.cls, RewritePass):
        merges = "yes" if info.cls.mergeable else "no"
        facts = f"works on: {', '.join(info.cls.on)}   numerics: {info.cls.numerics}   merges: {merges}"
    show_registered(info, as_json, facts)


def list_registered(found: Mapping[str, Info[Any]], kind: str, as_json: bool) -> None:
    """Print passes, say, with the distribution each comes from."""
    listed = [
        {
            "name": info.name,
            "distribution": info.distribution,
            "version": info.version,
            "about": _about(info.cls),
        }
        for info in sorted(found.values(), key=lambda i: i.name)
    ]
    if as_json:
        _print_json(listed)
        return
    table = Table(kind, "from", "what it does", box=None, header_style="bold")
    for row in listed:
        names = ", ".join((row["name"], *getattr(found[row["name"]].cls, "aliases", ())))
        table.add_row(names, f"{row['distribution']} {row['version']}", row["about"])
    console().print(table)


def show_registered(info: Info[Any], as_json: bool, facts: str = "") -> None:
    """Print one of them with its options."""
    options = describe_options(info.cls)
    if as_json:
        _print_json(
            {
                "name": info.name,
                "distribution": info.distribution,
                "options": options,
                "doc": info.cls.__doc__,
            }
        )
        return
    out = console()
    out.print(Text(info.name, style="bold"), f"from {info.distribution} {info.version}")
    out.print(Text(_dedent(info.cls.__doc__ or "")))
    if facts:
        out.print(facts)
    table = Table("option", "type", "default", "", box=None, header_style="bold")
    for row in options:
        default = (
            "required" if row["required"] else "-" if row["default"] in (None, "") else str(row["default"])
        )
        table.add_row(row["option"], row["type"], default, row["description"])
    out.print(table)


def _about(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


def _dedent(doc: str) -> str:
    import inspect as python_inspect

    return python_inspect.cleandoc(doc)


@click.command(cls=PassCommand)
@click.argument("model", required=False)
@click.option("--recipe", type=click.Path(path_type=Path), help="Read the passes from a recipe file.")
@click.option(
    "--freeze-base/--no-freeze-base", default=None, help="Freeze the base first (default: where needed)."
)
@click.option("--why", is_flag=True, help="List where the pattern of a pass nearly is, and why it is not.")
@data_option
@json_option
@model_options
@click.pass_context
def plan(
    ctx: click.Context,
    model: str | None,
    recipe: Path | None,
    freeze_base: bool | None,
    why: bool,
    data: tuple[Path, ...],
    as_json: bool,
    plugins: Plugins,
    loader: Callable[..., Program],
) -> None:
    """Show what `apply` would do: every site, every refusal, ties, parameters added. Changes nothing."""
    wanted = wanted_recipe(ctx, model, recipe, freeze_base, plugins)
    program = loader(wanted.model, wanted)
    report = program.plan(*wanted.passes, freeze_base=wanted.freeze_base, data=read_data(program, data))
    if as_json:
        _print_json([_plan_json(p, why) for p in report.passes])
        return
    out = console()
    for planned in report.passes:
        out.print(_plan_title(planned))
        if planned.sites:
            table = Table(
                "site", "role", "weight", "adds", "note", box=None, header_style="bold", padding=(0, 1)
            )
            for row in planned.sites:
                note = (
                    Text(f"refused: {row.refusal}", style="red")
                    if row.refusal
                    else Text(_note(planned.pass_, row), style="yellow")
                )
                # Of a pattern's value, which has no weight, what is fixed.
                shape = "×".join(str(size) if isinstance(size, int) else "…" for size in row.site.shape)
                table.add_row(
                    row.site.path,
                    row.site.role,
                    shape,
                    count(row.parameters) if not row.refusal else "",
                    note,
                )
            out.print(table)
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


def _freed(program: Program, passes: Sequence[PassPlan]) -> set[str]:
    """Parameters that nothing would read any more, by the names that they are counted by."""
    return {program.names.get(name, (name,))[0] for planned in passes for name in planned.freed}


def _trainable_after(program: Program, report: PlanReport) -> int:
    trains: dict[str, bool] = {}
    masks = {name: program.tensors[mask] for name, mask in program.schedule.masks.items()}
    for planned in report.passes:
        trains.update(planned.trains)
        masks = {name: mask for name, mask in masks.items() if name not in planned.trains}
        masks.update(planned.selection.masks)
    sizes, freed = program.parameter_sizes(), _freed(program, report.passes)
    kept = sum(
        trained_values(n, masks.get(k))
        for k, n in sizes.items()
        if k not in freed and trains.get(k, program.trains(k))
    )
    return kept + sum(planned.parameters for planned in report.passes)


def wanted_recipe(
    ctx: click.Context, model: str | None, recipe: Path | None, freeze_base: bool | None, plugins: Plugins
) -> Recipe:
    """Model and passes from the command line and the recipe together; the command line wins."""
    given = parse_groups(ctx)
    read = read_recipe(recipe, plugins) if recipe is not None else Recipe(())
    if read.later:
        said = f"{', '.join(read.later)} of {recipe} {'are' if len(read.later) > 1 else 'is'} left out here"
        click.echo(f"note: {said}; surgery run carries them out", err=True)
    reference = model or read.model
    if reference is None:
        raise click.UsageError("no MODEL was given, and no recipe names one")
    refuse_code(model, reference, recipe)
    passes_ = (*read.passes, *given)
    if not passes_:
        raise click.UsageError("no pass was given: add --pass NAME or --recipe FILE; see `surgery passes`")
    chosen = freeze_base if freeze_base is not None else read.freeze_base
    return Recipe(passes_, reference, read.task, read.model_kwargs, chosen)


def refuse_code(model: str | None, reference: str, recipe: Path | None) -> None:
    """Raise SurgeryError where a recipe names code to run that the command line does not name."""
    if model is None and reference.startswith("py:"):
        raise SurgeryError(
            f"recipe {recipe} names code, {reference}; to run that code, name it again as MODEL"
        )


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


def _note(pass_: Any, row: Any) -> str:
    said = pass_.note(row.site) if row.specs else ""
    notes = [said] if said else []
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


@click.command()
@click.argument("a")
@click.argument("b")
@json_option
@model_options
def diff(a: str, b: str, as_json: bool, plugins: Plugins, loader: Callable[..., Program]) -> None:
    """Show what changed from A to B, node by node."""
    found = diff_programs(loader(a), loader(b))
    if as_json:
        _print_json(
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


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, default=str))


COMMANDS = [inspect, passes, plan, diff]
