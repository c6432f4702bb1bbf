"""Shapes as text, with the names of dynamic dimensions: `batch×seq×576`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgery.capture.shapes import symbol_names
from surgery.capture.types import Captured


class Dimensions:
    """Names the sizes of a captured graph.

    Args:
        captured: The captured model, whose inputs name the dimensions.
    """

    def __init__(self, captured: Captured) -> None:
        self.names = symbol_names(captured)
        self._known: dict[Any, str] = {}

    def size(self, size: Any) -> str:
        """A size as text: "576", "batch", "2·seq"."""
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr
        if expression not in self._known:
            named = expression.subs({s: self._named(s) for s in expression.free_symbols})
            self._known[expression] = str(named).replace("*", "·").replace(" ", "")
        return self._known[expression]

    def _named(self, symbol: Any) -> Any:
        """A symbol by the name of its dimension."""
        name, step, shift = self.names.get(str(symbol), (str(symbol), 1, 0))
        return (type(symbol)(name, integer=True) - shift) / step

    def shape(self, sizes: Iterable[Any]) -> str:
        """A shape as text: "batch×seq×576"; "scalar" for none."""
        return "×".join(self.size(size) for size in sizes) or "scalar"
