"""Layers of surgery/: no upward imports, no circular imports, and each planted violation is found."""

from __future__ import annotations

import shutil

import pytest

from tests import architecture


def test_no_fault():
    assert architecture.faults() == []


def test_the_docs_print_the_table():
    page = (architecture.ROOT / "docs" / "architecture.md").read_text()
    assert architecture.table() in page


# What is planted, the file that it is added to, and what the fault must name.
PLANTED = {
    "an upward import at the top": (
        "graph/sites.py",
        "from surgery.engine.probe import Probe",
        "graph may not import that",
    ),
    "an upward import under TYPE_CHECKING": (
        "capture/trace.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from surgery.engine.base import Base",
        "capture may not import that",
    ),
    "an upward import inside a function": (
        "passes/share.py",
        "def planted():\n    from surgery.export.program import export_program\n    return export_program",
        "passes may not import that",
    ),
    "an upward import of a package": ("train/loop.py", "import surgery.export", "train may not import that"),
    "an upward relative import": ("store/saved.py", "from ..live import model", "store may not import that"),
    "an import of the public names": (
        "engine/fold.py",
        "from surgery import Program",
        "engine may not import that",
    ),
    "a circle within a package": (
        "engine/journal.py",
        "from surgery.engine.replay import pass_of",
        "a circle of",
    ),
    "a circle hidden inside a function": (
        "graph/sites.py",
        "def planted():\n    from surgery.graph.view import View\n    return View",
        "a circle of",
    ),
    "a lazy import of surgery itself": (
        "export/parity.py",
        "def planted():\n    from surgery.common import files\n    return files",
        "move it to the top",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_found(what, tmp_path):
    path, text, says = PLANTED[what]
    shutil.copytree(
        architecture.ROOT / "surgery", tmp_path / "surgery", ignore=shutil.ignore_patterns("__pycache__")
    )
    file = tmp_path / "surgery" / path
    file.write_text(f"{file.read_text()}\n\n{text}\n")
    found = [line for line in architecture.faults(tmp_path) if says in line]
    assert found, f"not found: {what}"
    assert any(path in line for line in found)


def test_a_crowded_root_and_an_unknown_package_are_found(tmp_path):
    shutil.copytree(
        architecture.ROOT / "surgery", tmp_path / "surgery", ignore=shutil.ignore_patterns("__pycache__")
    )
    for number in range(20):
        (tmp_path / "surgery" / f"extra{number}.py").write_text("")
    (tmp_path / "surgery" / "misc").mkdir()
    (tmp_path / "surgery" / "misc" / "__init__.py").write_text("")
    found = architecture.faults(tmp_path)
    assert any("entries, over 16" in line for line in found)
    assert any("'misc'" in line for line in found)
