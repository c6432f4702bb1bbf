"""The commands of docs/using_results.md run as they are written."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.cli.inference.conftest import run
from tests.train.conftest import write

PAGE = (Path(__file__).parents[3] / "docs" / "using_results.md").read_text()
COMMANDS = re.findall(r"^    ((?:echo .* \| )?surgery .*?)(?:  +#.*)?$", PAGE, re.M)


@pytest.fixture(scope="module")
def lm(llama_folder, tmp_path_factory):
    """A llama, and its export for generation."""
    folder = tmp_path_factory.mktemp("lm") / "onnx"
    run("export", f"hf:{llama_folder}", "--generate", "-o", folder)
    return {"lm": llama_folder, "lm-onnx": folder}


@pytest.fixture(scope="module")
def place(forms, bert_folder, lm, tmp_path_factory):
    """A directory with everything that the page names."""
    folder = tmp_path_factory.mktemp("page")
    for name, source in {"trained": forms.trained, "hf": forms.hf, "encoder": bert_folder, **lm}.items():
        shutil.copytree(source, folder / name)
    shutil.copy(forms.onnx, folder / "model.onnx")
    shutil.copy(forms.test, folder / "test.csv")
    pairs = [{"anchor": f"the {a}", "positive": f"{a} is it"} for a in ("cat", "dog", "tree")]
    write(folder / "pairs.jsonl", pairs)
    return folder


def test_there_are_commands():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(command, place, monkeypatch):
    monkeypatch.chdir(place)
    said, piped, rest = command.partition(" | ")
    words = shlex.split(rest if piped else command)
    printed = run(*words[1:], stdin=shlex.split(said)[1] + "\n" if piped else "")
    written = next((option for option in ("-o", "--html") if option in words), None)
    if written:
        assert (place / words[words.index(written) + 1]).stat().st_size
    else:
        # The llama is random: its tokens may have no text.
        assert printed.strip() or words[1] == "generate"
