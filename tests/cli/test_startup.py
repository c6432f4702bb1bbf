"""Start-up: help, version and completion import neither torch nor plugins, and `import surgery` imports little."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

import click
import pytest

import surgery
from surgery.cli import choices, cli
from surgery.cli.group import BUILT_IN
from surgery.cli.recipe import Merging
from surgery.cli.settings import read_settings
from surgery.common.options import describe_options
from surgery.engine.contract.combination import METHODS, Majority
from surgery.train.options import Settings
from surgery.train.request import HELD_OUT
from tests.shared.installed import COMMAND, PASS, install

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "accelerate")
# Runs the command line, then reports which heavy modules were imported, on a line of its own.
RUN = f"""
import json, sys
from surgery.cli import main
try:
    main()
except SystemExit as stopped:
    code = stopped.code or 0
    print("\\n" + json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))
"""


def fresh(code, *args, **environment):
    """Standard output of Python code in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def started(*args, **environment):
    """Output, exit code and imported heavy modules of a command line."""
    printed, _, report = fresh(RUN, *args, **environment).rstrip().rpartition("\n")
    code, imported = json.loads(report)
    return printed, code, imported


def completed(words, **environment):
    """Bash completions for the last word."""
    place = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    printed, code, imported = started(_SURGERY_COMPLETE="bash_complete", **place, **environment)
    assert (code, imported) == (0, [])
    return [line.partition(",")[2] for line in printed.split()]


HELP = {
    "apply": ("apply", "--help"),
    "apply, with a model": ("apply", "hf:model", "-o", "out", "--help"),
    "plan, after its options": ("plan", "--why", "--help"),
    "train, with data": ("train", "saved", "--data", "rows.jsonl", "--help"),
    **{name: (name, "--help") for name in BUILT_IN if name != "apply"},
}


@pytest.mark.parametrize("case", HELP)
def test_help_of_a_command_imports_no_torch(case):
    args = HELP[case]
    printed, code, imported = started(*args)
    assert (code, imported) == (0, [])
    assert printed.startswith(f"Usage: surgery {args[0]} ")
    assert "--help" in printed


def test_help_and_version_import_no_torch():
    printed, code, imported = started("--help")
    assert (code, imported) == (0, [])
    for name, (_, _, text) in BUILT_IN.items():
        assert f"  {name} " in printed
        assert text in printed
    printed, code, imported = started("--version")
    assert (code, imported) == (0, [])
    assert printed.startswith("surgery, version ")


def test_completion_imports_no_torch():
    assert completed(["surgery", ""]) == sorted(BUILT_IN)
    assert completed(["surgery", "im"]) == ["import-lora", "import-peft"]
    assert completed(["surgery", "--v"]) == ["--version"]
    assert {"--recipe", "--output", "--data"} <= set(completed(["surgery", "apply", "--"]))
    # The options of a pass are not offered, since they need its class; those of the command are.
    assert completed(["surgery", "apply", "m", "--pass", "lora", "--rank", "8", "--ov"]) == ["--overwrite"]
    assert completed(["surgery", "merge", "x", "--quantized", "re"]) == ["requantize", "residual"]
    assert completed(["surgery", "no-such-command", "--"]) == ["--version", "--plugin", "--help"]


def test_a_command_finds_the_attribute_that_the_table_names():
    context = click.Context(cli)
    for name in BUILT_IN:
        command = cli.get_command(context, name)
        assert isinstance(command, click.Command)
        assert command.name == name
    assert cli.get_command(context, "no-such-command") is None


def test_repeated_choices_are_those_of_the_definitions():
    merges = get_args(Merging.model_fields["quantized"].annotation)
    repeated = (choices.COMBINE_METHODS, choices.MAJORITIES, choices.QUANTIZED_MERGES, choices.HELD_OUT)
    assert repeated == (METHODS, get_args(Majority), merges, HELD_OUT)


def test_the_settings_in_the_source_are_the_fields_of_the_class():
    read = read_settings()
    assert [setting.name for setting in read] == list(Settings.model_fields)
    for setting, row, info in zip(
        read, describe_options(Settings), Settings.model_fields.values(), strict=True
    ):
        assert (setting.option, setting.default) == (row["option"], row["default"])
        assert setting.description == row["description"]
        assert setting.choices == tuple(c for c in get_args(info.annotation) if isinstance(c, str))
        assert setting.is_flag == (info.annotation is bool)


# -- commands of plugins


def plugin(folder, command="click.command('hello')"):
    """A distribution whose command is an entry point, and which imports torch."""
    source = f'''
import torch, click
from surgery.api import hookimpl

@{command}
@click.pass_obj
def hello(plugins):
    """Says hello."""
    click.echo(f"hello, {{type(plugins).__name__}}")
'''
    install(folder, "surgery-hello", source)
    points = folder / "surgery_hello-1.2.dist-info" / "entry_points.txt"
    points.write_text("[surgery.commands]\nhello = surgery_hello:hello\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_the_command_of_an_entry_point_is_listed_without_its_import(tmp_path):
    path = plugin(tmp_path)
    printed, code, imported = started("--help", **path)
    assert (code, imported) == (0, [])
    assert "hello        From the plugin surgery-hello." in printed
    assert completed(["surgery", "he"], **path) == ["hello"]
    assert started("hello", **path)[:2] == ("hello, Plugins\n", 0)


def test_the_command_of_a_hook_works_and_is_listed_once_plugins_are_loaded(tmp_path):
    install(tmp_path, "surgery-good", PASS.format(cls="Good", name="good") + COMMAND)
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    printed, code, imported = started("--help", **path)
    assert (code, imported) == (0, [])
    assert "hello" not in printed
    printed, code, imported = started("hello", **path)
    assert (printed, code) == ("hello from a plugin\n", 0)
    assert "torch" in imported


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "no_such_decorator",
            "the command 'hello' of the plugin 'surgery-hello' cannot be loaded: NameError",
        ),
        ("(lambda f: f)", "gives surgery_hello:hello for the command 'hello', which is not a click command"),
        (
            None,
            "several plugins add a command 'hello': 'surgery-hello', 'surgery-other'; uninstall all but one",
        ),
    ],
)
def test_a_faulty_command_is_one_line(change, said, tmp_path):
    path = plugin(tmp_path, change or "click.command('hello')")
    if change is None:
        install(tmp_path, "surgery-other", "")
        points = tmp_path / "surgery_other-1.2.dist-info" / "entry_points.txt"
        points.write_text("[surgery.commands]\nhello = surgery_other:hello\n")
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "hello"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **path},
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line


# -- the package


@pytest.mark.parametrize("use", ["", "[getattr(surgery, name) for name in surgery.__all__]"])
def test_import_surgery_imports_no_transformers(use):
    code = f"import sys, surgery\n{use}\nprint([name for name in {HEAVY[1:]} if name in sys.modules])"
    assert fresh(code).strip() == "[]"


def test_every_public_name_is_there():
    assert all(hasattr(surgery, name) for name in surgery.__all__)
    assert set(surgery.__all__) <= set(dir(surgery))
    assert callable(surgery.testing.check_pass)
    assert callable(surgery.penalties.l1)
    assert callable(surgery.api.make_plugin_manager)
    with pytest.raises(AttributeError, match="module 'surgery' has no attribute 'no_such_name'"):
        _ = surgery.no_such_name


def test_the_imports_for_type_checkers_are_those_of_the_table():
    tree = ast.parse(inspect.getsource(surgery))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    named = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert named.pop("penalties") == "surgery.train"
    assert named == surgery._MODULE_OF
    assert {*named, "penalties", "__version__"} == set(surgery.__all__)


@pytest.mark.parametrize("first", ["surgery.capture.trace", "surgery.store.load", "surgery.api"])
def test_the_function_capture_is_not_hidden_by_the_package_capture(first):
    code = f"import surgery; import {first}; print(callable(surgery.capture), surgery.capture.__module__)"
    assert fresh(code).strip() == "True surgery.store.load"
    assert inspect.ismodule(import_module("surgery.capture"))
