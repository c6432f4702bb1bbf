"""The example of every pass and objective runs as it is written, with tiny models and data under the names it uses."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from surgery.cli import main
from surgery.cli.reference import example_of
from surgery.common.plugins import make_plugin_manager
from surgery.engine.registry import passes
from surgery.train.registry import objectives
from tests.shared.documented_models import stand_ins, write_data
from tests.shared.example_plugins import example_plugin

_PLUGINS = make_plugin_manager()
CLASSES = {name: info.cls for found in (passes, objectives) for name, info in found(_PLUGINS).items()}
# One of each kind in the suite; the others are slow tests.
IN_THE_SUITE = {"lora", "quantize", "head", "layerwise", "fuse-qkv", "prune-filters", "classification", "dpo"}


@pytest.fixture(scope="session")
def tiny_refs(tmp_path_factory):
    return stand_ins(tmp_path_factory.mktemp("models"))


def run(line: str, refs: dict[str, str], capsys) -> None:
    """Run a command line with tiny models; training for two steps."""
    for ref, own in refs.items():
        line = re.sub(re.escape(ref) + r"(?= )", own, line)
    words = shlex.split(line)
    assert words[0] == "surgery"
    steps = ["--steps", "2", "--batch", "2"] if words[1] == "train" else []
    with pytest.raises(SystemExit) as done:
        main([*words[1:], *steps])
    said = capsys.readouterr()
    assert done.value.code == 0, said.err


@pytest.mark.parametrize(
    "name", [n if n in IN_THE_SUITE else pytest.param(n, marks=pytest.mark.slow) for n in CLASSES]
)
def test_an_example_runs(name, tiny_refs, tmp_path, monkeypatch, capsys):
    assert CLASSES[name].example, f"{name} has no example of its own"
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    lines = example_of(CLASSES[name])
    flag = "--objective" if lines[-1].startswith("surgery train") else "--pass"
    assert f"{flag} {name} " in lines[-1]
    for line in lines:
        assert line.count(" hf:") + line.count(" timm:") <= 1
        run(line, tiny_refs, capsys)
    made = re.search(r"-o (\S+)/$", lines[-1])
    assert made is not None
    assert (tmp_path / made[1] / "surgery.json").is_file()


def test_the_names_of_the_suite_exist():
    assert set(CLASSES) >= IN_THE_SUITE


def test_a_pass_without_one_has_one_made(tiny_refs, tmp_path, monkeypatch, capsys):
    """The made example of a third party's pass runs too, with a model in its place."""
    monkeypatch.chdir(tmp_path)
    vera = example_plugin("vera")
    (line,) = example_of(vera.Vera)
    assert line == "surgery apply MODEL --pass vera --target all -o changed/"
    given = line.replace("MODEL", f"MODEL --plugin {vera.__file__}")
    run(given.replace("MODEL ", "hf:HuggingFaceTB/SmolLM2-135M "), tiny_refs, capsys)


def test_the_help_shows_it_unbroken(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    for command, name in (("apply", "lora"), ("train", "multi-task")):
        with pytest.raises(SystemExit):
            main([command, "--objective" if command == "train" else "--pass", name, "--help"])
        shown = capsys.readouterr().out
        for line in example_of(CLASSES[name]):
            assert f"\n  {line}\n" in shown
    with pytest.raises(SystemExit):
        main(["passes", "lora", "--json"])
    assert json.loads(capsys.readouterr().out)["example"] == example_of(CLASSES["lora"])
