"""`surgery run`: one file describes all stages from a base to ONNX; a stopped run keeps its finished stages."""

from __future__ import annotations

import json

import onnx
import pytest
import yaml

import surgery
from surgery.api.programs import make_plugin_manager
from surgery.cli import main, stages
from surgery.cli.recipe import read_recipe, write_recipe
from surgery.common.errors import SurgeryError
from tests.train.conftest import llama_folder, texts  # noqa: F401

TRAIN = {
    "objective": "causal-lm", "held_out": 0.25, "lr": "1e-2", "batch": 4, "steps": 4, "max_length": 16,
}  # fmt: skip
PASSES = [{"pass": "lora", "target": "attn.*", "rank": 2}]
FINISH = [{"pass": "quantize", "target": "attn.*,mlp.*", "format": "int8"}]


@pytest.fixture
def recipe(tmp_path, llama_folder, texts):  # noqa: F811
    def make(**changed):
        sections = {
            "model": f"hf:{llama_folder}", "passes": PASSES, "train": {**TRAIN, "data": str(texts)},
            "merge": True, "finish": FINISH, "export": "lm.onnx", **changed,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in sections.items() if v is not None}))
        return path

    return make


def run(capsys, *line, code=0):
    with pytest.raises(SystemExit) as raised:
        main(["run", *map(str, line)])
    said = capsys.readouterr()
    assert raised.value.code == code, said.err
    return said.out if not code else said.err


def test_from_base_to_onnx_with_a_stop_between(recipe, tmp_path, capsys, monkeypatch):
    out, path = tmp_path / "out", recipe()
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise SurgeryError("the disk is full")

        patch.setattr(stages, "export_program", full)
        line = run(capsys, path, "-o", out, code=2)
    assert "the disk is full (finished in" in line
    assert "adapted, trained, merged, finished; continue with --resume)" in line
    assert not (out / "lm.onnx").exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    line = run(capsys, path, "-o", out, code=2)
    assert "holds an earlier run; use --resume to continue it, or --overwrite to start again" in line
    line = run(capsys, recipe(merge=None), "-o", out, "--resume", code=2)
    assert "was started with another 'merge'" in line

    found = json.loads(run(capsys, recipe(), "-o", out, "--resume", "--json").splitlines()[-1])
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert found["stages"] == ["adapted", "trained", "merged", "finished"]
    assert found["onnx"]["parity"] <= 1e-5  # fp32 and the same codes
    assert {p.name for p in out.iterdir()} >= {
        "recipe.yaml", "adapted", "trained", "trained.run", "merged", "finished", "lm.onnx",
    }  # fmt: skip
    trained, finished = surgery.load(str(out / "trained")), surgery.load(str(out / "finished"))
    assert [e.id for e in trained.journal] == ["freeze", "lora"]
    assert any(t.abs().max() > 0 for n, t in trained.tensors.items() if n.endswith(".lora.B"))
    assert [e.id for e in finished.journal] == ["quantize"]  # on the merged model
    held = {t.name for t in onnx.load(out / "lm.onnx").graph.initializer}
    assert any(name.endswith(".quantize.codes") for name in held)
    assert not any(".lora." in name for name in held)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": {**TRAIN, "data": "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
        ({"train": {"objective": "causal", "data": "x"}}, "causal"),
        ({"train": {"objective": "causal-lm"}}, "'train': 'data' is missing or invalid"),
        ({"train": {**TRAIN, "data": "x.txt", "rate": 1}}, "'train': training has no option --rate"),
        ({"train": ["sft"]}, "'train' must be a mapping"),
        (
            {"train": {**TRAIN, "data": {"a": "x.txt"}}},
            "'data' names data sets, but objective 'causal-lm' reads one",
        ),
        ({"merge": {"quantised": "auto"}}, "recipe's merge has no option --quantised"),
        ({"export": {"file": "../x.onnx"}}, "must be a name in the directory of the run"),
        ({"export": 3}, "'export' must be a mapping of options, or true"),
        ({"finish": [{"format": "int8"}]}, "pass 1 of 'finish' must be a mapping with a 'pass' name"),
    ],
)
def test_a_wrong_recipe_is_one_line(changed, said, recipe, tmp_path, capsys):
    line = run(capsys, recipe(**changed), "-o", tmp_path / "out", code=2)
    assert said in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"passes": [{"pass": "prefix"}], "finish": None}, "'merge': prefix has no merged form"),
        (
            {"passes": [{"pass": "lora", "target": "attn.q"}, {"pass": "prefix"}]},
            "'finish': passes after a merge need a model without adapters, and prefix has no merged form",
        ),
        ({"finish": [{"pass": "quantize", "target": "conv"}]}, "'finish': target 'conv'"),
    ],
)
def test_a_stage_that_cannot_work_is_said_before_the_first(changed, said, recipe, tmp_path, capsys):
    line = run(capsys, recipe(**changed), "-o", tmp_path / "out", code=2).splitlines()[-1]
    assert said in line
    assert not (tmp_path / "out").exists()


def test_stages_that_have_not_run_can_be_edited(recipe, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    objective = {"name": "causal-lm", "text": "nothing"}
    wrong = recipe(train={**TRAIN, "objective": objective, "data": str(texts)}, finish=None)
    assert "no column 'nothing'" in run(capsys, wrong, "-o", out, code=2)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["adapted"]
    line = run(capsys, recipe(passes=[{"pass": "lora", "target": "attn.v"}]), "-o", out, "--resume", code=2)
    assert "was started with another 'passes'" in line
    assert "its stage 'adapted' depends on it" in line
    said = run(capsys, recipe(finish=None), "-o", out, "--resume")
    assert f"{out / 'adapted'} is there" in said
    assert "parity in onnxruntime" in said


def test_code_is_named_by_whoever_runs_it(recipe, tmp_path, capsys):
    path = recipe(model="py:tests.shared.models:attention", train=None, finish=None)
    assert "names code" in run(capsys, path, "-o", tmp_path / "out", code=2)
    line = path, "py:tests.shared.models:attention", "-o", tmp_path / "out"
    said = run(capsys, *line)
    for stage in ("adapted", "lora: ", "folded lora into", "parity in onnxruntime"):
        assert stage in said, stage
    assert "is there" in run(capsys, *line, "--resume")
    assert "is there" not in run(capsys, *line, "--overwrite")


def test_what_is_there_is_not_replaced(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    line = run(capsys, recipe(), "-o", tmp_path / "out", "--overwrite", code=2)
    assert "is not an earlier run; choose another -o" in line
    assert (tmp_path / "out" / "thesis.tex").exists()


SEVERAL = {
    "objective": {"name": "multi-task", "task": {"a": "causal-lm", "b": "causal-lm,end=false"}},
    "data": {"a": "a.jsonl", "b": ["b.jsonl", "c.jsonl"]},
}


@pytest.mark.parametrize("train", [None, SEVERAL], ids=["one", "several"])
def test_written_and_read_back(train, recipe, tmp_path):
    plugins = make_plugin_manager()
    read = read_recipe(recipe(**({"train": train} if train else {})), plugins)
    assert read.train is not None
    assert len(read.train.data) == (2 if train else 1)
    write_recipe(tmp_path / "again.yaml", read)
    assert read_recipe(tmp_path / "again.yaml", plugins) == read


def test_apply_says_what_it_leaves_out(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["apply", "--recipe", str(recipe()), "-o", str(tmp_path / "adapted")])
    assert not raised.value.code
    assert "train, merge, finish, export of" in capsys.readouterr().err
