"""The HTML page: one file, safe with any name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from surgery.export.show.model import model_data
from surgery.export.show.page import page, to_json
from tests.shared.stacks import program

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


class Scripts(HTMLParser):
    """The script elements, and attributes that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.title = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.loads += [(tag, v) for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        if getattr(self, "inside", "") == "script":
            self.scripts.append(data)
        if getattr(self, "inside", "") == "title":
            self.title += data

    def handle_endtag(self, tag):
        self.inside = ""


def hostile():
    """A program whose every name is an attack."""
    data = model_data(program(), HOSTILE)
    ops = tuple(
        dataclasses.replace(
            op, op=HOSTILE + op.op, role=HOSTILE, by=HOSTILE, module=op.module and f"m{HOSTILE}"
        )
        for op in data.ops
    )
    weights = {
        n + HOSTILE: dataclasses.replace(w, name=n + HOSTILE, by=HOSTILE, tied=(HOSTILE,))
        for n, w in data.weights.items()
    }
    ops = tuple(dataclasses.replace(op, weights=tuple(w + HOSTILE for w in op.weights)) for op in ops)
    facts = (("classes of logits", HOSTILE), (HOSTILE, "\u2028 ]]> --> <!--<script>"), ("lone", "\ud800"))
    return dataclasses.replace(data, ops=ops, weights=weights, classes={f"m{HOSTILE}": HOSTILE}, facts=facts)


def test_the_page_loads_nothing():
    text = page(model_data(program(), "stack"))
    found = Scripts(text)
    assert found.loads == [("link", "data:,")]
    assert "default-src 'none'" in text
    assert "connect-src" not in text
    assert not re.search(
        r"sourceMappingURL|@import|url\((?!#arrow)|import\(|fetch\(|XMLHttpRequest|WebSocket", text
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text)
    json.loads(found.scripts[0])


def test_hostile_names_stay_data():
    text = page(hostile())
    found = Scripts(text)
    plain = Scripts(page(model_data(program(), "stack")))
    # The attack adds no element: there are the same elements as in the page of harmless names.
    assert found.tags == plain.tags
    assert found.title == HOSTILE
    data = json.loads(found.scripts[0])
    assert data["title"] == HOSTILE
    assert data["root"]["children"][0]["cls"] == HOSTILE
    text.encode()


def test_json_for_a_script_element():
    value = {"<a>&": "</script>\u2028\u2029\ud800", "__proto__": 1}
    text = to_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    assert json.loads(text) == value


def test_a_name_that_looks_like_a_place_of_the_template_is_left_alone():
    text = page(model_data(program(), "{{script}} {{data}}"))
    assert Scripts(text).title == "{{script}} {{data}}"


def test_bundled_libraries_are_as_published():
    assets = resources.files("surgery.export.show").joinpath("assets")
    digest = hashlib.sha256(assets.joinpath("dagre.min.js").read_bytes()).hexdigest()
    assert digest in assets.joinpath("README.md").read_text("utf-8")
    assert "Permission is hereby granted" in assets.joinpath("dagre.LICENSE").read_text("utf-8")


@pytest.mark.slow
def test_the_wheel_has_the_page(tmp_path):
    root = Path(__file__).parents[3]
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    shutil.copytree(root / "surgery", tmp_path / "surgery", ignore=shutil.ignore_patterns("__pycache__"))
    # Without isolation: the build needs setuptools alone, and there may be no network.
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "out"),
        str(tmp_path),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = {path.name for path in (root / "surgery" / "export" / "show" / "assets").iterdir()}
    assert {"page.html", "page.css", "page.js", "dagre.min.js", "dagre.LICENSE", "README.md"} == assets
    assert {f"surgery/export/show/assets/{name}" for name in assets} <= names
