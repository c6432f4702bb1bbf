"""Reference pages agree with the docstrings."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.api.programs import make_plugin_manager
from surgery.cli.reference import objective_pages, pages

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("folder", "make"), [("passes", pages), ("objectives", objective_pages)])
def test_pages_are_up_to_date(folder, make):
    """`make docs` writes them; pages of removed passes must be deleted."""
    known = {name: text for name, text in make(make_plugin_manager()).items() if name != "README.md"}
    written = {p.name: p.read_text() for p in (DOCS / folder).glob("*.md") if p.name != "README.md"}
    assert {name: text for name, text in known.items() if written.get(name) != text} == {}
    assert set(written) == set(known)
