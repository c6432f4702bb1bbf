"""Numbers and sizes in words."""

from __future__ import annotations


def count(number: int) -> str:
    """A number with three digits and a unit: 12_345 is 12.3k."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return str(number)


def in_bytes(number: int) -> str:
    """A size in bytes with three digits and a unit: 12_345 is 12.3 kB."""
    for size, suffix in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= 0.9995 * size:  # 999,600 has three digits as 1.00 MB
            return f"{number / size:#.3g}".rstrip(".") + f" {suffix}"
    return f"{number} bytes"
