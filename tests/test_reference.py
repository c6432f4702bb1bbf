"""The pages of reference are what the docstrings say now."""

from __future__ import annotations

from pathlib import Path

from surgery.api import make_plugin_manager
from surgery.cli.reference import pages

FOLDER = Path(__file__).parent.parent / "docs" / "passes"


def test_pages_are_up_to_date():
    """`make docs` writes them; a page of a pass that is gone has to go too."""
    plugins = make_plugin_manager()
    known = {name: text for name, text in pages(plugins).items() if name != "README.md"}
    written = {path.name: path.read_text() for path in FOLDER.glob("*.md") if path.name != "README.md"}
    assert {name: text for name, text in known.items() if written.get(name) != text} == {}
    assert set(written) == set(known)
