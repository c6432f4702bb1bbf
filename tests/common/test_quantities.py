"""Sizes in words."""

from __future__ import annotations

import pytest

from surgery.common.quantities import in_bytes

SIZES = {
    812: "812 bytes",
    1_000: "1.00 kB",
    22_346: "22.3 kB",
    91_046_000: "91.0 MB",
    542_600_000: "543 MB",
    999_600: "1.00 MB",
    999_400: "999 kB",
    12 * 10**9: "12.0 GB",
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_three_digits(size):
    assert in_bytes(size) == SIZES[size]
