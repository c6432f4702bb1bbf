"""The built wheel holds what an installed surgery needs beside its modules."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """`python -m build --wheel` on a copy, since a build leaves files behind."""
    copy = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "surgery", copy / "surgery", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", copy / "dist", copy],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=copy,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(made)


@pytest.mark.slow
def test_every_file_of_the_package_is_in_the_wheel(wheel):
    """py.typed, the templates of `surgery new-plugin`, the assets of `surgery view`, and every module."""
    files = (path for path in (ROOT / "surgery").rglob("*") if path.is_file() and path.suffix != ".pyc")
    wanted = {str(path.relative_to(ROOT)) for path in files}
    assert "surgery/py.typed" in wanted
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == wanted


@pytest.mark.slow
def test_its_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    said = Parser().parsestr(wheel.read(name).decode())
    assert said["Name"] == "torch-surgery"
    assert "Typing :: Typed" in said.get_all("Classifier")
    assert said.get_all("Project-URL")
    assert "lora" in said["Keywords"]
    assert set(said.get_all("Provides-Extra")) >= {"hf", "timm", "hub", "onnx", "train", "all", "docs"}
    (entries,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "surgery = surgery.cli:main" in wheel.read(entries).decode()
