"""Names from files: none of them becomes code, at the first wall or at the second."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import surgery
from surgery.common import names
from surgery.common.errors import JournalError, LoadError, PassError, SurgeryError
from surgery.engine import schema
from surgery.graph import compiled
from surgery.live import adapted
from surgery.store import saved
from tests.security import crafted
from tests.security.mutations import CODE, MARKER
from tests.shared import models

# A tensor is read where it is registered, so a name without dots runs at the first forward.
EXPLOIT = CODE[0]


def lora_a(folder):
    return next(name for name in crafted.read_header(folder / saved.INSERTED)[0] if name.endswith("lora.A"))


@pytest.mark.parametrize(
    "name", [*CODE, "", ".", "a..b", "é", "a b", "x" * 600, "forward", "__class__.x", "self"]
)
def test_a_crafted_tensor_name_is_refused(name, folder, base, plugins):
    crafted.rename(folder, lora_a(folder), name)
    with pytest.raises(JournalError) as raised:
        surgery.load(str(folder), base=base, plugins=plugins)
    assert len(str(raised.value)) < 1000


@pytest.fixture
def first_wall_down(monkeypatch):
    """Every check of names where they enter does nothing."""
    monkeypatch.setattr(names, "is_plain", lambda *_: True)
    monkeypatch.setattr(schema, "is_plain", lambda *_: True)
    monkeypatch.setattr(saved, "check_plain", lambda name, *_: name)
    monkeypatch.setattr(saved, "_check_free", lambda *_: None)


@pytest.mark.parametrize("form", ["run", "module", "train", "export", "live"])
def test_the_second_wall_refuses_what_the_first_lets_through(
    form, folder, base, plugins, first_wall_down, tmp_path
):
    crafted.rename(folder, lora_a(folder), EXPLOIT)
    if form == "live":
        module, inputs = models.attention()
        with pytest.raises(SurgeryError):
            surgery.load_(module, folder, inputs=inputs)
        return
    program = surgery.load(str(folder), base=base, plugins=plugins)
    forms = {
        "run": program.run,
        "module": lambda: program.module()(*program.example_inputs[0]),
        "train": lambda: program.module().graph_module(training=False),
        "export": lambda: program.export(tmp_path / "x.onnx"),
    }
    with pytest.raises(SurgeryError, match="cannot be written into code safely"):
        forms[form]()
    assert [file.name for file in tmp_path.iterdir()] == ["adapted"]


def test_without_walls_the_name_is_code(folder, base, plugins, first_wall_down, monkeypatch, elsewhere):
    """The exploit works in this version of torch, so the tests above prove something."""
    monkeypatch.setattr(compiled, "check_targets", lambda graph: None)
    crafted.rename(folder, lora_a(folder), EXPLOIT)
    with contextlib.suppress(SurgeryError):  # the name stands for a tuple by then
        surgery.load(str(folder), base=base, plugins=plugins).run()
    assert (elsewhere / MARKER).exists()
    (elsewhere / MARKER).unlink()


def test_a_live_module_refuses_the_name_and_is_as_it_was(folder, monkeypatch):
    torch.manual_seed(0)
    module, inputs = models.attention()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    name = lora_a(folder)
    crafted.rename(folder, name, EXPLOIT)
    with pytest.raises(JournalError, match="is named"):
        surgery.load_(module, folder, inputs=inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", [EXPLOIT, 'a"', "a\\b", "a\nb", "a(b)", "a[0]", "a'b"])
@pytest.mark.parametrize("op", ["get_attr", "call_module", "placeholder"])
def test_no_such_target_is_compiled(name, op):
    graph = fx.Graph()
    node = graph.create_node(op, name)
    graph.output(node)
    with pytest.raises(SurgeryError, match="cannot be written into code safely"):
        compiled.compiled(nn.Module(), graph)
    with pytest.raises(SurgeryError, match="cannot be written into code safely"):
        adapted.Source.of(graph, "planted")


def test_names_of_a_peft_checkpoint(base, tmp_path):
    adapted = base.apply(surgery.Lora(target="attn.*", rank=2))
    surgery.export_peft(adapted, tmp_path / "good")
    for number, name in enumerate((*CODE, "a..b", "x" * 600)):
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / str(number)))
        header, body = crafted.read_header(folder / "adapter_model.safetensors")
        first = next(key for key in header if "lora_A" in key)
        for new in (name, f"base_model.model.{name}.lora_A.weight"):
            changed = {new if key == first else key: value for key, value in header.items()}
            (folder / "adapter_model.safetensors").write_bytes(crafted.with_header(changed, body))
            with pytest.raises(LoadError):
                surgery.import_peft(folder, base)


@pytest.mark.parametrize("name", [*CODE, "a.b", "a b", "x" * 200])
def test_labels_and_heads(name):
    with pytest.raises(PassError):
        surgery.Lora.parse({"target": "attn.*", "as": name})
    with pytest.raises(PassError):
        surgery.Head.parse({"mode": "add", "labels": 2, "head_name": name})


@pytest.mark.parametrize(
    "at",
    [
        ("journal", 1, "id"), ("journal", 1, "pass"), ("journal", 1, "distribution"),
        ("journal", 1, "sites", 0, "key", "owner"), ("journal", 1, "sites", 0, "key", "kind"),
        ("journal", 1, "options", "as"), ("base", "ref"), ("base", "task"), ("parameters", 0), ("schema",),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", CODE[:2])
def test_other_names_of_a_manifest(at, name, folder, base, plugins):
    manifest = crafted.manifest_of(folder)
    inner = manifest
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = name
    crafted.seal(folder, manifest)
    # Names that are not used, because the base was given, may stay.
    try:
        surgery.load(str(folder), base=base, plugins=plugins).run()
    except SurgeryError as error:
        assert len(str(error)) < 1000  # noqa: PT017


def test_a_base_that_was_passed_is_as_it_was_when_the_directory_is_refused(base, plugins, folder):
    """Tensors of the base that the directory stores are written into the base before the journal is read."""
    header, body = crafted.read_header(folder / saved.BASE)
    (folder / saved.BASE).write_bytes(crafted.with_header(header, bytes(len(body))))
    manifest = crafted.manifest_of(folder)
    manifest["journal"][1]["sites"][0]["key"]["owner"] = "nowhere"
    crafted.seal(folder, manifest)
    before = {name: tensor.clone() for name, tensor in base.base.tensors.items()}
    with pytest.raises(JournalError, match="has no site"):
        surgery.load(str(folder), base=base, plugins=plugins)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.base.tensors.items())
    assert any(tensor.any() for tensor in before.values())
