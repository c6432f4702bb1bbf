"""A benchmark as one HTML file without a network: a table, and the quality against size and latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from surgery.cli.benchmarks import conditions, ratio, size_text
from surgery.cli.inference.benchmark import BATCHES, Benchmark, Figures

_WIDTH, _HEIGHT, _MARGIN = 560, 340, 76
_COLOURS = ("#2f6fbb", "#c4572b", "#2d8a5b", "#8b4fb3", "#b0862a", "#3b8fa0", "#b03a63", "#6b6f76")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; } thead { border-bottom: 2px solid; }
tbody tr { border-bottom: 1px solid #8884; } small { opacity: .7; }
figure { display: inline-block; margin: 1rem 1rem 0 0; } svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 12px; } svg line { stroke: currentColor; opacity: .3; }
"""

Axis = tuple[str, Callable[[Figures], float | None]]


def benchmark_page(found: Benchmark) -> str:
    """The HTML of a benchmark. Names of models are escaped."""
    size: Axis = ("size (MB)", lambda each: each.size / 1e6 if each.size is not None else None)
    fast: Axis = ("latency at batch 1 (ms)", lambda each: each.latency[1] * 1e3)
    if found.metric:
        better = "higher is better" if found.larger else "lower is better"
        quality: Axis = (f"{found.metric} ({better})", lambda each: each.quality)
        plots = [(size, quality), (fast, quality)]
    else:
        plots = [(size, fast)]
    drawn = "".join(f"<figure>{svg}</figure>" for x, y in plots if (svg := _scatter(found.models, x, y)))
    titles = ["model", "form", "size", *(f"batch {batch}" for batch in BATCHES), "tokens/s"]
    titles += [found.metric] if found.metric else []
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    rows = "".join(_row(each, found) for each in found.models)
    about = f"{conditions(found)}; ratios are to the first model"
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>surgery benchmark</title>'
        f"<style>{_STYLE}</style>\n<h1>Benchmark</h1>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>\n<p><small>{escape(about)}</small></p>\n"
        f"{drawn}\n</html>\n"
    )


def _row(each: Figures, found: Benchmark) -> str:
    first = found.models[0]
    cells = [(size_text(each), ratio(each.size, first.size))]
    cells += [(f"{each.latency[b] * 1e3:.2f} ms", ratio(each.latency[b], first.latency[b])) for b in BATCHES]
    cells.append(("-" if each.tokens is None else f"{each.tokens:,.1f}", ratio(each.tokens, first.tokens)))
    if found.metric:
        cells.append(("-" if each.quality is None else f"{each.quality:.4f}", ""))
    shown = "".join(
        f"<td>{escape(text)}{f' <small>{escape(more)}</small>' if more and each is not first else ''}</td>"
        for text, more in cells
    )
    return f"<tr><td>{escape(each.ref)}</td><td>{escape(each.kind)}</td>{shown}</tr>"


def _scatter(models: Sequence[Figures], x: Axis, y: Axis) -> str:
    """An SVG with one labelled point for each model that has both values; "" if none has."""
    points = [
        (number, each.ref, a, b)
        for number, each in enumerate(models)
        if (a := x[1](each)) is not None and (b := y[1](each)) is not None and a == a and b == b
    ]
    if not points:
        return ""
    left, right = _range([a for _, _, a, _ in points])
    low, high = _range([b for _, _, _, b in points])

    def place(a: float, b: float) -> tuple[float, float]:
        across = _MARGIN + (a - left) / (right - left) * (_WIDTH - 2 * _MARGIN)
        return across, _HEIGHT - _MARGIN - (b - low) / (high - low) * (_HEIGHT - 2 * _MARGIN)

    parts = []
    for step in range(5):
        a, b = left + (right - left) * step / 4, low + (high - low) * step / 4
        across, down = place(a, b)
        bottom = _HEIGHT - _MARGIN
        parts.append(f'<line x1="{across:.1f}" y1="{_MARGIN}" x2="{across:.1f}" y2="{bottom}"/>')
        parts.append(f'<line x1="{_MARGIN}" y1="{down:.1f}" x2="{_WIDTH - _MARGIN}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle">{a:.4g}</text>')
        parts.append(f'<text x="{_MARGIN - 6}" y="{down + 4:.1f}" text-anchor="end">{b:.4g}</text>')
    for number, name, a, b in points:
        across, down = place(a, b)
        colour = _COLOURS[number % len(_COLOURS)]
        end = "end" if across > _WIDTH / 2 else "start"
        beside = across + (-9 if end == "end" else 9)
        short = name if len(name) <= 28 else f"…{name[-27:]}"
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="6" fill="{colour}"><title>{escape(name)}: {a:.4g}, {b:.4g}'
            f'</title></circle><text x="{beside:.1f}" y="{down - 8:.1f}" text-anchor="{end}">{escape(short)}</text>'
        )
    middle = _HEIGHT / 2
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{escape(y[0])} against {escape(x[0])}">{"".join(parts)}'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x[0])}</text>'
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y[0])}</text>'
        "</svg>"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis, with room at both sides."""
    low, high = min(values), max(values)
    room = (high - low) * 0.15 or abs(high) * 0.15 or 1.0
    return low - room, high + room
