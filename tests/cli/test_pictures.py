"""`surgery view` and `surgery diff --html`: the files that they write, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.cli import main
from tests.shared.stacks import STACK, program


def run(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def data_of(path: Path) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1]
    )


def test_view_writes_a_page(tmp_path, capsys):
    page = tmp_path / "new" / "model.html"
    code, out, _ = run(capsys, "view", STACK, "-o", page)
    assert code == 0
    assert f"wrote {page}" in out
    data = data_of(page)
    assert (data["kind"], data["title"]) == ("view", STACK)
    assert [child["name"] for child in data["root"]["children"]] == ["embed", "blocks.0–2", "norm", "head"]
    assert list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize("command", [("view", STACK, "-o"), ("diff", STACK, STACK, "--html")])
def test_files_are_not_replaced_unasked(command, tmp_path, capsys):
    page = tmp_path / "model.html"
    page.write_text("mine")
    code, _, err = run(capsys, *command, page)
    assert code == 2
    assert err == f"error: {page} exists; choose another file, or pass --overwrite\n"
    assert page.read_text() == "mine"
    code, _, err = run(capsys, *command, tmp_path)
    assert code == 2
    assert "is a directory; name a file" in err
    assert run(capsys, *command, page, "--overwrite")[0] == 0
    assert page.read_text().startswith("<!doctype html>")


def test_diff_compares_values_on_the_inputs(tmp_path, capsys):
    adapted = program().apply(surgery.Lora(target="blocks.1.down", rank=2))
    with torch.no_grad():
        for tensor in adapted.tensors.values():
            tensor.fill_(0.3)
    adapted.save(tmp_path / "adapted")
    page = tmp_path / "diff.html"
    code, out, _ = run(capsys, "diff", STACK, tmp_path / "adapted", "--base", STACK, "--html", page)
    assert code == 0
    assert "values compared on the example inputs: max|a − b| / max|a|" in out
    moved = {op.get("module", ""): op.get("moved") for op in data_of(page)["ops"]}
    assert moved["blocks.0"] == 0 < moved["blocks.2"]
    code, out, _ = run(
        capsys,
        "diff",
        STACK,
        tmp_path / "adapted",
        "--base",
        STACK,
        "--html",
        page,
        "--overwrite",
        "--no-values",
    )
    assert code == 0
    assert "values compared" not in out
    assert not data_of(page)["moved"]


def test_json_of_diff_stays_json(tmp_path, capsys):
    code, out, _ = run(capsys, "diff", STACK, STACK, "--json", "--html", tmp_path / "diff.html")
    assert code == 0
    assert json.loads(out)["nodes"] == []


def test_options_of_the_page_need_a_page(tmp_path, capsys):
    code, _, err = run(capsys, "diff", STACK, STACK, "--no-values")
    assert code == 2
    assert "--html diff.html" in err


def test_data_that_do_not_fit_are_refused(tmp_path, capsys):
    save_file({"y": torch.zeros(2)}, tmp_path / "data.safetensors")
    code, _, err = run(
        capsys, "diff", STACK, STACK, "--html", tmp_path / "d.html", "--data", tmp_path / "data.safetensors"
    )
    assert code == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "d.html").exists()
