"""`surgery plan`: what each pass would do, with folded blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery.capture.dimensions import Dimensions
from surgery.cli.recipe import Recipe
from surgery.cli.render import console, note_unfrozen, print_json, trainable_line
from surgery.common.folding import Folding, Row, selected, times
from surgery.common.quantities import count
from surgery.engine.change.plans import PassPlan, PlanReport, SitePlan
from surgery.engine.contract.base import GraphPass
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.contract.selection import in_words
from surgery.engine.program import Program
from surgery.engine.state import trained_values


def show_plan(
    program: Program, report: PlanReport, wanted: Recipe, why: bool, as_json: bool, folding: Folding
) -> None:
    """Print a plan: each pass with its sites, and the parameters that would train.

    Args:
        program: program that the plan is for.
        report: the plan.
        wanted: passes and --freeze-base of the command line.
        why: list near misses of patterns.
        as_json: print JSON, which lists every site.
        folding: sites to show, and how deep.
    """
    if as_json:
        print_json([_plan_json(p, why) for p in report.passes])
        return
    out = console()
    named = Dimensions(program.captured)
    for planned in report.passes:
        out.print(_plan_title(planned))
        if planned.sites:
            out.print(_sites_table(planned, folding, named))
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
    smaller = [planned for planned in report.passes if planned.freed and planned.parameters]
    if smaller:
        total = sum(sizes.values())
        left = total + sum(p.parameters for p in smaller)
        left -= sum(sizes.get(name, 0) for name in _freed(program, smaller))
        out.print(f"{count(left)} of {count(total)} left")


def _sites_table(planned: PassPlan, folding: Folding, named: Dimensions) -> Table:
    """The sites of a pass; the notes on a site lie below its path, where they have room."""
    table = Table("site", "role", "weight", "adds", box=None, header_style="bold", padding=(0, 1))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    rows = [Row(site.site.path, _facts(planned, site, named), site) for site in planned.sites]
    rows = selected(rows, [site.site.role for site in planned.sites], folding.role)
    for path, places, item in folding.tree(rows).lines():
        if item.cut:
            added = sum(0 if row.value.refusal else row.value.parameters for row in item.below)
            name = Text(path or "the model").append(times(places), style="cyan")
            table.add_row(name, "", f"{len(item.below)} sites", count(added))
            continue
        for row in item.rows:
            role, shape, added, note, refused = row.alike
            name = Text(path).append(times(places), style="cyan")
            if note:
                name.append(f"\n  {note}", style="red" if refused else "yellow")
            table.add_row(name, role, shape, added)
    return table


def _facts(planned: PassPlan, row: SitePlan, named: Dimensions) -> tuple[str, str, str, str, bool]:
    """Role, shape, added parameters and note of a site, and True if it is refused."""
    note = f"refused: {row.refusal}" if row.refusal else _note(planned.pass_, row)
    # The site of a pattern has no weight but the shape of a value, with named sizes.
    shape = named.shape(row.site.shape)
    return row.site.shown_role, shape, "" if row.refusal else count(row.parameters), note, bool(row.refusal)


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
                "cross": row.site.cross,
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
