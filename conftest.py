"""Marks as slow what tests/slow.txt lists, and spends no time on what small models do not need."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# torch's cache of fake tensors pays from two dozen layers on; models of two layers are captured a third quicker
# without it. It is read when torch is imported, here and in the processes that tests start.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
# A worker of pytest-xdist is told the width of a terminal that it does not write to.
os.environ.pop("COLUMNS", None)

LISTED = Path(__file__).parent / "tests" / "slow.txt"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lines = LISTED.read_text().splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    files = {item.nodeid.split("::")[0] for item in items}
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    whole = not any("::" in argument for argument in config.args)
    gone = listed - {item.nodeid for item in items}
    stale = sorted(name for name in gone if name.split("::")[0] in files)
    if whole and stale:
        raise pytest.UsageError(f"{LISTED.name} lists {stale[0]}, which is no test")


def pytest_collection_finish() -> None:
    """What is imported stays; no collection of garbage needs to go through it again."""
    gc.collect()
    gc.freeze()
