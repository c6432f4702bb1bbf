"""One captured base for all tests, and a working directory in which nothing may appear."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch

import surgery
from surgery.api.programs import make_plugin_manager
from tests.security.mutations import MARKER
from tests.shared import models

EVIL = f"""
from pathlib import Path
Path({MARKER!r}).write_text("imported")

def make(**options):
    Path({MARKER!r}).write_text("called")

def score(prompts, responses):
    Path({MARKER!r}).write_text("called")
"""


@pytest.fixture(scope="session")
def plugins():
    return make_plugin_manager()


@pytest.fixture(scope="session")
def base(plugins):
    """A captured attention layer; loading with it captures nothing again."""
    torch.manual_seed(0)
    module, inputs = models.attention()
    return surgery.capture(module, inputs, plugins=plugins)


@pytest.fixture(scope="session")
def stored(base, tmp_path_factory):
    """A saved directory with LoRA on every projection; tests copy it."""
    folder = tmp_path_factory.mktemp("stored") / "adapted"
    program = base.apply(surgery.Lora(target="attn.*", rank=2))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(0, 0.05)
    program.save(folder)
    return folder


@pytest.fixture
def folder(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path / "adapted"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Run in a directory with a module that would leave a mark, and check that nothing did."""
    place = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(place)
    (place / "evil.py").write_text(EVIL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield place
    assert {file.name for file in place.iterdir()} <= {"evil.py", "__pycache__"}
