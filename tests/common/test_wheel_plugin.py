"""plugins/torch-surgery-ia3 as a third party would ship it: a wheel, installed, used and uninstalled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "torch-surgery-ia3"
MODEL = "py:tests.shared.models:attention"


def run(command, code=0, **environment):
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves build/ and egg-info where it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(
        PLUGIN, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", copy])
    (built,) = (folder / "dist").glob("*.whl")
    assert built.name == "torch_surgery_ia3-0.1.0-py3-none-any.whl"
    return built


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The Python of a fresh environment that has what this one has, by links, but none of our plugins."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    (site,) = (folder / "lib").glob("python*/site-packages")
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.search(r"torch_surgery_[a-z]", item.name) and item.name != "__pycache__":
            (site / item.name).symlink_to(item)
    return folder / "bin" / "python"


def test_installed_used_and_uninstalled(wheel, clean, tmp_path):
    def surgery(*args, code=0):
        return run([clean, "-c", "from surgery.cli import main; main()", *args], code, COLUMNS="120")

    def pip(*args):
        run([sys.executable, "-m", "pip", "--python", clean, "--disable-pip-version-check", *args])

    assert "ia3" not in surgery("passes").stdout
    line = surgery("apply", MODEL, "--pass", "ia3", "-o", tmp_path / "early", code=2).stderr
    assert line.startswith("error: there is no pass 'ia3'")

    pip("install", "--quiet", "--no-index", wheel)  # with its dependencies checked
    try:
        listed = surgery("passes").stdout
        assert any("ia3" in row and "torch-surgery-ia3" in row for row in listed.splitlines())
        assert "--scale" in surgery("passes", "ia3").stdout
        adapted, merged = tmp_path / "adapted", tmp_path / "merged"
        # An attention alone has no feed-forward: the default target says so.
        assert "mlp.down" in surgery("apply", MODEL, "--pass", "ia3", "-o", adapted, code=2).stderr
        surgery("apply", MODEL, "--pass", "ia3", "--target", "attn.k,attn.v,attn.out", "-o", adapted)
        surgery("merge", adapted, "--base", MODEL, "-o", merged)
        assert "agree" in surgery("verify", adapted, merged, "--base", MODEL).stdout
    finally:
        pip("uninstall", "--quiet", "--yes", "torch-surgery-ia3")

    assert "ia3" not in surgery("passes").stdout
    line = surgery("inspect", adapted, "--base", MODEL, code=2).stderr.strip()
    assert line == (
        "error: pass 'ia3' comes from the plugin 'torch-surgery-ia3'; pip install torch-surgery-ia3"
    )
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            [clean, "-c", "import torch_surgery_ia3"], check=True, capture_output=True, cwd=tmp_path
        )
