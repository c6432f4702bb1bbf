"""Run the benchmarks, print one table and write out/benchmarks.json."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import sys
import warnings
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models import MissingPeer
from benchmarks.timing import Row

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("match", "step", "in_place", "merge", "onnx_latency", "generation", "startup")
# These run only if they are named: they take long, or need libraries that the set-up does not install.
APART = ("patterns", "prune", "training", "recurrences")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = f"{', '.join(NAMES)} (default: all of these), or {', '.join(APART)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=known)
    parser.add_argument("--quick", action="store_true", help="MiniLM only, small sizes, few rounds")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch and onnxruntime (1: measures CPU time)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks.json"))
    parser.add_argument("--write", action="store_true", help="also write a page for each into benchmarks/")
    asked = parser.parse_args(argv)
    unknown = [name for name in asked.names if name not in (*NAMES, *APART)]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join((*NAMES, *APART))}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(asked.threads)
    rows: list[Row] = []
    missing: list[str] = []
    for name in asked.names or NAMES:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            for row in importlib.import_module(f"benchmarks.{name}").run(asked.quick):
                rows.append(row)
                ratio = "" if row.ratio is None else f", ratio {row.ratio:.3g}"
                print(f"  {row.what}{ratio}", file=sys.stderr, flush=True)
        except MissingPeer as error:
            missing.append(f"{name}: {error}")
    _print(rows, asked.threads)
    for name in dict.fromkeys(row.benchmark for row in rows) if asked.write else ():
        page = _page(name, [row for row in rows if row.benchmark == name], asked.threads)
        (ROOT / "benchmarks" / f"{name}.md").write_text(page)
    for line in missing:
        print(line, file=sys.stderr)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    found = [{**dataclasses.asdict(row), "met": row.met} for row in rows]
    asked.out.write_text(
        json.dumps({"threads": asked.threads, "quick": asked.quick, "rows": found}, indent=1)
    )
    return 1 if missing else 0


def _print(rows: list[Row], threads: int) -> None:
    clock = "CPU time of one thread" if threads == 1 else f"wall time, {threads} threads"
    title = f"medians of interleaved rounds, {clock}; ratio = ours / peer, with quartiles"
    table = Table("measured", "ours", "peer", "ratio", "spread", "aim", "met?", "note", title=title)
    section = ""
    for row in rows:
        if section and row.benchmark != section:
            table.add_section()
        section = row.benchmark
        peer = f"{_value(row.peer, row.unit)} {row.peer_name}".strip()
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        spread = "" if row.low is None or row.high is None else f"{row.low:.3g}–{row.high:.3g}"
        aim = "" if row.aim is None else f"≤ {row.aim:g}"
        met = {None: "", True: "yes", False: "no"}[row.met]
        table.add_row(row.what, _value(row.ours, row.unit), peer, ratio, spread, aim, met, row.note)
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def _page(name: str, rows: list[Row], threads: int) -> str:
    """Markdown page of one benchmark."""
    clock = "CPU time of one thread" if threads == 1 else f"wall time, {threads} threads"
    about = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").strip()
    lines = [
        f"# {name}",
        "",
        f"`python -m benchmarks {name} --write` wrote this page on {date.today()}.",
        "",
        about,
    ]
    lines += ["", f"Medians of interleaved rounds, {clock}. The ratio is ours / peer, with quartiles.", ""]
    lines += ["| measured | ours | peer | ratio | quartiles | aim | note |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        spread = "" if row.low is None or row.high is None else f"{row.low:.3g}–{row.high:.3g}"
        aim = "" if row.aim is None else f"≤ {row.aim:.3g}: {'met' if row.met else '**missed**'}"
        peer = f"{_value(row.peer, row.unit)} {row.peer_name}".strip()
        cells = (row.what, _value(row.ours, row.unit), peer, ratio, spread, aim, row.note)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _value(value: float | None, unit: str) -> str:
    if value is None or math.isnan(value):
        return ""
    if unit != "s":
        return f"{value:,.4g} {unit}".strip()
    return f"{value:.2f} s" if abs(value) >= 1 else f"{value * 1e3:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())
