"""Completion of passes, options, values, roles and saved adapters, in real bash and zsh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from surgery.cli.completion import TABLE
from surgery.cli.completion_table import completion_table
from surgery.common.plugins import make_plugin_manager

# What a terminal's completion script calls: the words and the number of the word at the cursor.
LINES = {
    "surgery apply m --pass lo": ["lora", "low-rank"],
    "surgery apply m --pass lora --init ": ["kaiming", "gaussian", "pissa"],
    "surgery apply m --pass lora --rsl": ["--rslora"],
    "surgery plan m --pass lora --target mlp.g": ["mlp.gate", "mlp.gate_up"],
    "surgery apply m --pass lora --target attn.q,em": [
        "attn.q,embed", "attn.q,embed.*", "attn.q,embed.patch", "attn.q,embed.position", "attn.q,embed.token",
        "attn.q,embed.type",
    ],
    "surgery train m --objective cla": ["classification"],
    "surgery merge saved --only ": ["lora:film", "lora:news"],
    "surgery merge saved --weight lora:f": ["lora:film="],
    "surgery undo saved --pass lora:n": ["lora:news"],
    "surgery merge nothing --only ": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the command and a directory whose manifest names two adapters."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "saved").mkdir()
    journal = [{"id": "lora:film"}, {"id": "lora:news"}]
    (folder / "saved" / "surgery.json").write_text(json.dumps({"journal": journal}))
    command = folder / "surgery"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m surgery "$@"\n')
    command.chmod(0o755)
    return folder


def environment(folder, **more) -> dict[str, str]:
    paths = os.pathsep.join([str(folder), os.environ["PATH"]])
    source = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return {**os.environ, "PATH": paths, "PYTHONPATH": source, **more}


def test_the_table_is_that_of_the_passes():
    """`make docs` writes it."""
    assert json.loads(TABLE.read_text()) == completion_table(make_plugin_manager(entry_points=False))


BASH = """
eval "$(_SURGERY_COMPLETE=bash_source surgery)"
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_surgery_completion surgery
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize("line", LINES)
def test_bash(folder, line):
    words = " ".join(f"'{word}'" for word in line.split(" "))
    done = subprocess.run(
        ["bash", "-c", BASH.format(words=words)],
        env=environment(folder), cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == LINES[line], done.stderr


ZSH = """
zmodload zsh/zutil
compdef() {{ : }}
eval "$(_SURGERY_COMPLETE=zsh_source surgery)"
_describe() {{ local name=$argv[-2]; print -rl -- "${{(@P)name}}"; }}
compadd() {{ local name=$argv[-1]; print -rl -- "${{(@P)name}}"; }}
words=({words}); CURRENT=${{#words}}
_surgery_completion
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize("line", [line for line, found in LINES.items() if found])
def test_zsh(folder, line):
    words = " ".join(f"'{word}'" for word in line.split(" "))
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH.format(words=words)],
        env=environment(folder), cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert [word.replace("\\:", ":") for word in done.stdout.split()] == LINES[line], done.stderr
