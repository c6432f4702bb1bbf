"""`surgery new-plugin`: each kind is installed by pip as it was written, is listed, and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from surgery.cli.author import KINDS
from tests.shared.commands import call

# Each starts five processes. The kits themselves are tested in tests/testing.
SLOW = ("weight-op", "objective", "loader", "lowering")


def run(*command, site) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS]
)
def test_green_as_generated(kind, tmp_path):
    folder, site = tmp_path / "made", tmp_path / "site"
    name = f"torch-surgery-own-{kind}"
    code, said = call("new-plugin", name, "--kind", kind, "-o", folder)
    assert code == 0, said
    assert "$" not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    options = (
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--target",
        site,
    )
    run("pip", "install", *options, folder, site=site)
    assert f"{name} 0.1.0" in run("surgery", "plugins", site=site)
    run("pytest", "-q", "-p", "no:cacheprovider", folder / "tests", site=site)
    run("ruff", "check", folder, site=site)
    run("ruff", "format", "--check", folder, site=site)


@pytest.mark.parametrize(
    "name", ["Bad", "a_b", "-a", "surgery", "torch", "class", "torch-surgery-", "a" * 80]
)
def test_a_wrong_name_writes_nothing(name, tmp_path):
    code, said = call("new-plugin", "-o", tmp_path / "made", "--", name)
    assert code == 2
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(tmp_path):
    (tmp_path / "made").mkdir()
    code, said = call("new-plugin", "torch-surgery-own", "-o", tmp_path / "made")
    assert code == 2
    assert "exists; choose another name" in said
    assert not list((tmp_path / "made").iterdir())
