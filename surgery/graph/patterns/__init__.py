"""Multi-op patterns: written as code over ATen ops, matched in a graph, with reasons for near misses."""

from surgery.graph.patterns.expressions import (
    any_of,
    axis,
    constant,
    dtype_of,
    maybe,
    number,
    ops,
    shape_of,
    value,
)
from surgery.graph.patterns.index import OpIndex
from surgery.graph.patterns.match import Found, Match, NearMiss, Pattern, pattern
from surgery.graph.patterns.matching import find

__all__ = [
    "Found",
    "Match",
    "NearMiss",
    "OpIndex",
    "Pattern",
    "any_of",
    "axis",
    "constant",
    "dtype_of",
    "find",
    "maybe",
    "number",
    "ops",
    "pattern",
    "shape_of",
    "value",
]
