"""Mutations of every value of the files that surgery reads: each is refused with a SurgeryError, or works.

The quick tests try a few hundred mutations; the slow ones thousands. The seed is fixed, so that a failure repeats.
"""

from __future__ import annotations

import json
import random
import resource
import struct
from pathlib import Path

import pytest
import yaml

import surgery
from surgery.api.programs import make_plugin_manager
from surgery.cli.recipe import read_recipe
from surgery.common.errors import SurgeryError
from surgery.store import saved
from tests.security.mutations import MARKER, mutate, refused_or
from tests.shared.stacks import program

QUICK, MANY = 150, 2500
COUNTS = [QUICK, pytest.param(MANY, marks=pytest.mark.slow)]
# The base has 4,000 parameters: nothing that a file says may make a process take a GiB more than it has.
ROOM = 1024  # MiB

KINDS = {
    "lora": lambda p: p.apply(surgery.Lora(target="mlp.*", rank=2, dora=True), surgery.Adapter(size=3)),
    "quantized": lambda p: p.apply(
        surgery.Quantize(target="mlp.*", format="int8"), surgery.Lora(target="head", rank=2)
    ),
    "trained": lambda p: p.apply(surgery.Filter(), surgery.Full(target="head")),
    "shared": lambda p: p.apply(surgery.LowRank(target="mlp.*", rank=4)),
}
RECIPE = {
    "model": "py:tests.shared.stacks:stack",
    "passes": [
        {"pass": "lora", "target": "mlp.*,!re:head", "rank": 2, "alpha": 4.0, "as": "film", "dora": True},
        {"pass": "adapter", "size": 4},
        {"pass": "quantize", "target": "mlp.*", "format": "int8"},
    ],
    "train": {
        "objective": "classification",
        "data": ["x.jsonl"],
        "held_out": 0.2,
        "lr": "1e-3",
        "steps": 4,
        "batch": 2,
    },
    "export": {"file": "m.onnx", "opset": 18, "seed": 3},
}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture(autouse=True)
def held(tmp_path, monkeypatch):
    """No code runs and no memory goes."""
    monkeypatch.chdir(tmp_path)
    before = peak()
    yield
    assert not Path(MARKER).exists(), "code from a file ran"
    assert peak() - before < ROOM, f"{peak() - before:.0f} MiB more"


@pytest.fixture(scope="module")
def base() -> surgery.Program:
    return program()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_manifests(kind, count, base, tmp_path):
    KINDS[kind](base).save(tmp_path / "saved")
    file = tmp_path / "saved" / saved.MANIFEST
    document = json.loads(file.read_text())
    rng, ran, refused = random.Random(kind), 0, 0
    for _ in range(count):
        made, said = mutate({k: v for k, v in document.items() if k != "checksum"}, rng)
        try:
            file.write_text(json.dumps({**made, "checksum": saved._checksum(made)}))
        except RecursionError:  # json itself cannot write it
            continue

        def use():
            again = surgery.load(str(tmp_path / "saved"), base=base)
            again.run()
            return again

        outcome = refused_or(use, said)
        refused += isinstance(outcome, SurgeryError)
        ran += not isinstance(outcome, SurgeryError)
    assert ran, "no mutation was harmless: the mutations reach only one outcome"
    assert refused
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize("count", COUNTS)
def test_headers_of_safetensors(count, base, tmp_path):
    KINDS["lora"](base).save(tmp_path / "saved")
    file, tensors = tmp_path / "saved" / saved.MANIFEST, tmp_path / "saved" / saved.INSERTED
    document, raw = json.loads(file.read_text()), tensors.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    rng, refused = random.Random(7), 0
    for _ in range(count):
        made, said = mutate(header, rng)
        try:
            text = json.dumps(made).encode("utf-8", "surrogatepass")
        except RecursionError:
            continue
        tensors.write_bytes(struct.pack("<Q", len(text)) + text + body)
        manifest = {**document, "files": {**document["files"], saved.INSERTED: saved.sha256(tensors)}}
        file.write_text(json.dumps({**manifest, "checksum": saved._checksum(manifest)}))
        outcome = refused_or(lambda: surgery.load(str(tmp_path / "saved"), base=base).run(), said)
        refused += isinstance(outcome, SurgeryError)
    assert refused


@pytest.mark.parametrize("count", COUNTS)
def test_recipes(count, tmp_path):
    file, rng, plugins, refused = tmp_path / "recipe.yaml", random.Random(3), make_plugin_manager(), 0
    for _ in range(count):
        made, said = mutate(RECIPE, rng)
        try:
            text = yaml.safe_dump(made, sort_keys=False, allow_unicode=True)
        except (yaml.YAMLError, RecursionError):
            continue
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        refused += isinstance(refused_or(lambda: read_recipe(file, plugins), said), SurgeryError)
    assert refused
