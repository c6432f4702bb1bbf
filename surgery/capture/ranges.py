"""Ranges of dynamic dimensions as text: "h", "h=8..512", "h=8..", "h=..512", "h=32..512/32" (multiples of 32)."""

from __future__ import annotations

import re
from typing import Any

from torch.export import Dim

from surgery.common.errors import CaptureError

_TEXT = re.compile(r"(?P<name>[^=]+)(?:=(?P<low>\d{0,9})\.\.(?P<high>\d{0,9})(?:/(?P<step>\d{1,9}))?)?")


def named_range(text: str) -> tuple[str, Any]:
    """Parse a dimension.

    Args:
        text: the name, optionally with a range.

    Returns:
        The name, and the Dim; for multiples of a step it is the step times another Dim.

    Raises:
        CaptureError: the text is not a name with a range.
    """
    found = _TEXT.fullmatch(text.strip())
    name = found["name"].strip() if found else text
    if found is None or not name.isidentifier():
        raise CaptureError(
            f"{text!r} is not a valid dimension name; use letters, digits and underscores, with or without a range: "
            "'h', 'h=8..512', 'h=8..', or 'h=32..512/32' for multiples of 32"
        )
    step = int(found["step"] or 1)
    low, high = (int(found[end]) if found[end] else None for end in ("low", "high"))
    if step < 1 or (low is not None and high is not None and low >= high):
        raise CaptureError(f"{text!r} is an empty range; write the smaller size first, as in 'h=8..512'")
    if step == 1:
        return name, made(name, low, high)
    # torch has no multiples of a named dimension, only multiples of another dimension.
    return name, step * made(f"_{name}", low and -(-low // step), high and high // step)


def made(name: str, low: int | None, high: int | None) -> Any:
    """A Dim with the bounds that are given."""
    return Dim(name, **{key: size for key, size in (("min", low), ("max", high)) if size is not None})
