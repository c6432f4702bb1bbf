"""Patterns of many ops: written as code over ATen ops, found in a graph, and asked why where they nearly are."""

from surgery.patterns.expressions import (
    Pattern,
    any_of,
    axis,
    constant,
    dtype_of,
    maybe,
    number,
    ops,
    pattern,
    shape_of,
    value,
)
from surgery.patterns.found import Found, Match, NearMiss, OpIndex
from surgery.patterns.matching import find

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
