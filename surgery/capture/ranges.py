"""Dimensions as text: a name, an example size, and a range of sizes, each of which may be absent.

"h", "h=224", "h=8..512", "h=8..", "h=..512", "h=32..512/32" (multiples of 32), "h=224:32..512/32".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch.export import Dim

from surgery.common.errors import CaptureError

_TEXT = re.compile(
    r"(?P<name>[^=]+)(?:=(?:(?P<size>\d{1,9})(?::|$))?"
    r"(?:(?P<low>\d{0,9})\.\.(?P<high>\d{0,9})(?:/(?P<step>\d{1,9}))?)?)?"
)


@dataclass(frozen=True)
class Dimension:
    """A named dimension.

    Attributes:
        name: its name.
        size: size in the example, None if it is not given.
        low, high: smallest and largest size, None without a bound.
        step: sizes are multiples of this number.
    """

    name: str
    size: int | None = None
    low: int | None = None
    high: int | None = None
    step: int = 1

    @property
    def has_range(self) -> bool:
        """True if bounds or a step are given."""
        return (self.low, self.high, self.step) != (None, None, 1)

    @property
    def dim(self) -> Any:
        """The torch.export Dim; for multiples of a step it is the step times another Dim."""
        if self.step == 1:
            return made(self.name, self.low, self.high)
        # torch has no multiples of a named dimension, only multiples of another dimension.
        low, high = self.low and -(-self.low // self.step), self.high and self.high // self.step
        return self.step * made(f"_{self.name}", low, high)


def parse_dimension(text: str) -> Dimension:
    """Parse a dimension. Raises CaptureError if the text is not a name with a size or a range."""
    plain = text.strip()
    found = _TEXT.fullmatch(plain)
    name = found["name"].strip() if found else text
    given = found is not None and (found["size"] is not None or found["low"] is not None)
    if found is None or not name.isidentifier() or ("=" in plain and not given) or plain.endswith(":"):
        raise CaptureError(
            f"{text!r} is not a valid dimension name; use letters, digits and underscores, with or without a range: "
            "'h', 'h=8..512', 'h=8..', or 'h=32..512/32' for multiples of 32"
        )
    size, low, high = (int(found[part]) if found[part] else None for part in ("size", "low", "high"))
    step = int(found["step"] or 1)
    if step < 1 or (low is not None and high is not None and low >= high):
        raise CaptureError(f"{text!r} is an empty range; write the smaller size first, as in 'h=8..512'")
    return Dimension(name, size, low, high, step)


def named_range(text: str) -> tuple[str, Any]:
    """Parse a dimension of an input whose example is given.

    Args:
        text: the name, optionally with a range.

    Returns:
        The name, and the Dim; for multiples of a step it is the step times another Dim.

    Raises:
        CaptureError: the text is not a name with a range, or names a size.
    """
    found = parse_dimension(text)
    if found.size is not None:
        raise CaptureError(
            f"dimension {text!r} names a size, which the example input has; leave the size out"
        )
    return found.name, found.dim


def made(name: str, low: int | None, high: int | None) -> Any:
    """A Dim with the bounds that are given."""
    return Dim(name, **{key: size for key, size in (("min", low), ("max", high)) if size is not None})
