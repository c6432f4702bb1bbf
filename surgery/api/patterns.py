"""Passes that replace the matches of a pattern of several ops, and functions to write patterns."""

from __future__ import annotations

from surgery.engine.contract.pattern import PatternPass, stored
from surgery.graph.patterns import (
    Found,
    Match,
    NearMiss,
    OpIndex,
    Pattern,
    any_of,
    axis,
    constant,
    dtype_of,
    find,
    maybe,
    number,
    ops,
    pattern,
    shape_of,
    value,
)

__all__ = [
    "Found",
    "Match",
    "NearMiss",
    "OpIndex",
    "Pattern",
    "PatternPass",
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
    "stored",
    "value",
]
