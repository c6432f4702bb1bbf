"""Benchmarks in the terminal."""

from __future__ import annotations

from rich.table import Table

from surgery.cli.inference.benchmark import BATCHES, Benchmark, Figures
from surgery.cli.render import console


def size_text(figures: Figures) -> str:
    """Size of a model with its unit."""
    if figures.size is None:
        return "-"
    return f"{figures.size / 1e6:.2f} MB" if figures.size < 1e8 else f"{figures.size / 1e6:,.0f} MB"


def ratio(value: float | None, first: float | None) -> str:
    """A value relative to that of the first model, or nothing."""
    return f"{value / first:.2f}×" if value is not None and first else ""


def conditions(found: Benchmark) -> str:
    """Conditions of a benchmark, in words."""
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    where = ", ".join(found.devices)
    return f"medians of {found.rounds} rounds in turns, {threads} each, on {where}; inputs: {found.inputs}"


def tell_benchmark(found: Benchmark) -> None:
    """Print one table: absolute figures, and in the line below their ratio to those of the first model."""
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("model", overflow="fold", max_width=26)
    table.add_column("size", justify="right", no_wrap=True)
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    generates = any(each.tokens is not None for each in found.models)
    if generates:
        table.add_column("tokens/s", justify="right", no_wrap=True)
    if found.metric:
        table.add_column(found.metric, justify="right", no_wrap=True)
    first = found.models[0]
    for number, each in enumerate(found.models):
        cells = [size_text(each), *(f"{each.latency[batch] * 1e3:.2f} ms" for batch in BATCHES)]
        ratios = [
            ratio(each.size, first.size),
            *(ratio(each.latency[b], first.latency[b]) for b in BATCHES),
        ]
        if generates:
            cells.append("-" if each.tokens is None else f"{each.tokens:,.1f}")
            ratios.append(ratio(each.tokens, first.tokens))
        if found.metric:
            cells.append("-" if each.quality is None else f"{each.quality:.4f}")
            ratios.append("")
        table.add_row(each.ref, *cells)
        if number:
            table.add_row("", *ratios, style="dim")
    out = console()
    out.print(table)
    out.print(conditions(found))
