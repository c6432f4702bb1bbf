"""A name in a file can hold code; nothing that reads the file may run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

import surgery
from surgery.common.errors import JournalError, SurgeryError
from surgery.common.names import is_plain
from surgery.graph.compiled import compiled
from surgery.store import saved
from tests.security.mutations import CODE, MARKER
from tests.shared.stacks import STACK, program


def sealed(folder: Path, manifest: dict) -> None:
    """Write a manifest with correct checksums, as an attacker would."""
    for name in manifest["files"]:
        manifest["files"][name] = saved.sha256(folder / name)
    manifest["checksum"] = saved._checksum(manifest)
    (folder / saved.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("code", CODE)
def test_a_tensor_whose_name_is_code_is_refused(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program().apply(surgery.Lora(target="mlp.*", rank=2)).save(tmp_path / "crafted")
    tensors = load_file(tmp_path / "crafted" / saved.INSERTED)
    old = next(iter(tensors))
    name = code
    save_file({name if n == old else n: t for n, t in tensors.items()}, tmp_path / "crafted" / saved.INSERTED)
    text = (tmp_path / "crafted" / saved.MANIFEST).read_text()
    manifest = json.loads(text.replace(json.dumps(old), json.dumps(name)))
    sealed(tmp_path / "crafted", manifest)
    with pytest.raises(JournalError, match=r"names are made of letters|must be a line of text"):
        surgery.load(str(tmp_path / "crafted"), base=STACK).run()
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("op", ["get_attr", "call_module", "placeholder"])
@pytest.mark.parametrize("code", [c for c in CODE if '"' in c or "'" in c])
def test_a_target_that_is_code_is_never_compiled(code, op, tmp_path, monkeypatch):
    """The second wall: without it, the generated source has the code in it."""
    monkeypatch.chdir(tmp_path)
    graph = fx.Graph()
    target = code.replace(".", "_")
    node = graph.create_node(op, target, name="value")
    graph.output(node)
    with pytest.raises(SurgeryError, match="cannot be written into code safely"):
        compiled({target: nn.Identity() if op == "call_module" else torch.ones(1)}, graph)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("encoder.layer.0.query.lora.A", True),
        ("mlp.0.up.adapter-2.weight", True),
        ("", False),
        ("a..b", False),
        ("../a", False),
        ('a"b', False),
        ("a\nb", False),
        ("a" * 600, False),
        ("a b", False),
    ],
)
def test_plain_names(name, plain):
    assert is_plain(name) is plain


def test_a_rank_beyond_memory_is_refused_before_anything_is_allocated(tmp_path):
    program().apply(surgery.Lora(target="mlp.*", rank=2)).save(tmp_path / "huge")
    manifest = json.loads((tmp_path / "huge" / saved.MANIFEST).read_text())
    entry = manifest["journal"][0]
    entry["options"]["rank"] = 10**9
    manifest = json.loads(json.dumps(manifest).replace('"rank": 2', '"rank": 1000000000'))
    sealed(tmp_path / "huge", manifest)
    with pytest.raises(SurgeryError):
        surgery.load(str(tmp_path / "huge"), base=STACK)
