"""Programs, plans and reports in words and as HTML; and the notebook of the examples."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import surgery
from tests.shared.stacks import program as stack

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_look.ipynb"


def test_a_plan_prints_each_pass_and_folds_blocks():
    said = repr(stack().plan(surgery.Lora(target="blocks.*", rank=2)))
    assert said.splitlines()[0] == "Plan of 2 passes"
    assert "lora: 6 sites, " in said
    (row,) = (line.split() for line in said.splitlines() if "blocks.0–2.up" in line)
    assert row[:3] == ["lora", "blocks.0–2.up", "×3"]


def test_a_plan_gives_the_reason_of_a_refusal():
    planned = stack().plan(surgery.Lora(target="all", rank=2))
    refused = planned.passes[-1].refused
    assert refused
    assert all(site.refusal in repr(planned) for site in refused)


def test_a_report_says_what_happened_to_the_outputs():
    changed = stack().apply(surgery.Quantize(target="blocks.*"), surgery.Lora(target="blocks.*", rank=2))
    reports = {report.entry.id: repr(report) for report in changed.reports}
    assert "outputs: unchanged, bit for bit" in reports["lora"]
    assert "outputs: changed by " in reports["quantize"]
    assert "done: 6 sites" in reports["lora"]


def test_a_program_shows_its_passes_and_dimensions():
    changed = stack().apply(surgery.Lora(target="blocks.*", rank=2))
    html = changed._repr_html_()
    total, trainable = changed.count_parameters()
    assert f"<td>{total:,}</td>" in html
    assert f"<td>{trainable:,} (" in html
    assert "<td>lora</td><td>6 sites</td>" in html
    assert "batch" in html


def test_an_export_says_size_parity_and_shapes(tmp_path):
    report = stack().export(tmp_path / "m.onnx")
    said = repr(report)
    assert said.startswith(f"ONNX file {tmp_path / 'm.onnx'}\n")
    assert f"within {report.parity.error:.1e} of the outputs' scale" in said
    assert all(name in report._repr_html_() for name in (*report.inputs, *report.outputs))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Every cell runs in order; the value on its last line shows itself as HTML."""
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        *before, last = tree.body
        exec(compile(ast.Module(before, []), cell["id"], "exec"), names)
        assert isinstance(last, ast.Expr)
        value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
        shown.append(value._repr_html_())
    assert "Program of BertModel" in shown[0]
    assert "layer.0–5.attention.self.query ×6" in shown[1]
    assert "are codes" in shown[2]
    assert "changed by" in shown[3]
    assert "parity in onnxruntime" in shown[4]
    assert (tmp_path / "minilm.onnx").is_file()
