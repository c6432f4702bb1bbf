"""Names that do not exist fail before a model is loaded."""

from __future__ import annotations

import json

import pytest
import torch

import surgery
from surgery.cli import main
from surgery.common.errors import TargetError
from surgery.graph.targets import ROLES, check_roles
from tests.zoo import zoo

LORA = ("--pass", "lora", "--target")


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Fail if a command loads a model."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("surgery.store.load.load_model", loaded)
    monkeypatch.setattr("surgery.store.saved.load_model", loaded)


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("apply", "hf:a/b", "--pass", "lroa", "-o", "OUT"), "there is no pass 'lroa'; did you mean 'lora'"),
        (("plan", "hf:a/b", *LORA, "attn.q", "--rnak", "2"), "no option --rnak; did you mean 'rank'"),
        (("plan", "hf:a/b", "--pass", "quantize", "--format", "int5"), "--format is 'int5'"),
        (("plan", "hf:a/b", *LORA, "attn.qq"), "target 'attn.qq' is no role; did you mean 'attn.q'"),
        (("plan", "hf:a/b", *LORA, "mlp.*,attn.c_attn"), "for a name in the model write path:attn.c_attn"),
        (("plan", "hf:a/b", *LORA, "role:attention"), "target 'role:attention' is no role"),
        (
            ("train", "hf:a/b", "--objective", "clasification", "--data", "x.csv", "-o", "OUT"),
            "'classification'",
        ),
        (("merge", "hf:a/b", "--format", "hff", "-o", "OUT"), "'hff' is not one of 'surgery', 'hf'"),
    ],
)
def test_passes_options_objectives_formats_and_roles(args, message, nothing_loaded, capsys, tmp_path):
    assert message in refused(capsys, *(tmp_path / "out" if arg == "OUT" else arg for arg in args))


def test_a_recipe(nothing_loaded, capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: hf:a/b\npasses:\n- pass: lora\n  target: attn.qq\n")
    for command in (("plan", "--recipe", recipe), ("run", recipe, "-o", tmp_path / "out")):
        assert "target 'attn.qq' is no role" in refused(capsys, *command)


def test_adapters_of_a_saved_directory(nothing_loaded, monkeypatch, capsys, tmp_path):
    from tests.shared import models

    program = surgery.capture(*models.attention()).apply(
        surgery.Lora(target="attn.q", rank=2, label="film"),
        surgery.Lora(target="attn.v", rank=2, label="news"),
    )
    program.save(tmp_path / "two")
    out = ("-o", tmp_path / "out")
    for args in (
        ("export", tmp_path / "two", "--only", "filmm", *out),
        ("merge", tmp_path / "two", "--without", "filmm", *out),
        ("export-peft", tmp_path / "two", "--weight", "filmm=0.5", *out),
        ("undo", tmp_path / "two", "--pass", "filmm", *out),
        ("combine", tmp_path / "two", "--weight", "filmm=1", "--weight", "news=1", "--as", "mix", *out),
    ):
        assert "no pass 'filmm' in the journal; did you mean 'film'" in refused(capsys, *args)
    # A damaged journal is reported by the loader, and not here.
    path = tmp_path / "two" / "surgery.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "journal": 3}))
    assert "was edited or damaged" in refused(capsys, "merge", tmp_path / "two", "--only", "filmm", *out)


def test_only_names_that_no_model_can_have():
    for target in (
        "attn.*",
        "attn.q,!head",
        "*.query",
        "attn.q?",
        "mlp.**",
        "encoder.attn.c_attn",
        "all",
        "embed.*",
    ):
        check_roles(target)
    for role in ROLES:
        check_roles(role)
    with pytest.raises(TargetError, match=r"'mlp\.c_fc' is no role"):
        check_roles("mlp.c_fc")


@pytest.mark.parametrize(
    "name", ["bert", "llama", "t5", "deepseek_v3", "mixtral", "deberta-v2", "timm:resnet18"]
)
def test_the_roles_of_models_are_listed(name):
    if name not in zoo.NAMES:
        pytest.skip(f"{name} is not in the zoo")
    torch.manual_seed(0)
    loaded = zoo.build(name)
    program = surgery.Program(surgery_base(loaded))
    assert {site.role for site in program.sites} <= set(ROLES)


def surgery_base(loaded):
    from surgery.api.programs import make_plugin_manager
    from surgery.capture import trace
    from surgery.engine.base import Base

    return Base(loaded, trace(loaded, check=False), make_plugin_manager(entry_points=False))
