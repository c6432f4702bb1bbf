"""delta: a whole copy of a weight at one site, trained, merged bit for bit, scaled and undone."""

from __future__ import annotations

import json

import pytest
import torch

import surgery
from surgery.common.errors import PassError
from surgery.testing import CHECKS, check_pass
from tests.shared import models

QUICK = [name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx")]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return surgery.capture(*models.forms())


def test_kit_on_every_form_of_weight(base):
    report = check_pass(surgery.Delta(target="all,norm", bias=True), base, checks=QUICK)
    assert not report.skipped


def test_one_of_two_tied_uses_gets_the_copy(base, randomise):
    program = randomise(base.apply(surgery.Delta(target="head")), scale=0.5)
    value = program.tensors["head.delta.weight"]
    merged = program.merge()
    assert torch.equal(merged.run(), program.run())  # no op was added, so no sum is taken in another order
    state = merged.state()
    assert torch.equal(state["head.weight"], value)
    assert torch.equal(state["embed.weight"], base.base.tensors["embed.weight"])
    assert torch.equal(program.undo("delta").run(), base.run())


def test_on_top_of_another_adapter_and_scaled(base, randomise):
    program = base.apply(surgery.Lora(target="linear", rank=2), surgery.Delta(target="linear", label="a"))
    program = randomise(program.apply(surgery.Delta(target="linear", label="b")), scale=0.3)
    half = program.weighted({"b": 0.5})
    weight = base.base.tensors["linear.weight"]
    a, b = (program.tensors[f"linear.delta_{name}.weight"].detach() for name in "ab")
    lora = {n: program.tensors[f"linear.lora.{n}"].detach() for n in "AB"}
    expected = weight + (a - weight) + 0.5 * (b - weight) + 8 * lora["B"] @ lora["A"]  # s = 16 / 2
    got = half.merge().state()["linear.weight"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # fp32, three sums in another order


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{", "--source is"),
        ('{"config": {}}', r"--source\.tensors is"),
        ({"tensors": {"a": ["float128", [2]]}}, "unknown dtype"),
        ({"tensors": {"a b()": ["float32", [2]]}}, "other characters"),
        ({"tensors": {"a": ["float32", [-2]]}}, r"--source\.tensors\.a is"),
        ({"slots": {"linear": ["forward"]}}, r"--source\.slots\.linear is"),
    ],
)
def test_a_source_that_was_edited(source, said):
    if isinstance(source, dict):
        whole = {"config": {}, "tensors": {}, "slots": {}, "at": "linear", "digests": {}}
        source = json.dumps({**whole, **source})
    with pytest.raises(PassError, match=said):
        surgery.Delta.parse({"target": "linear", "source": source})


def test_on_a_quantized_weight_the_change_is_added(base):
    rounded = base.apply(surgery.Quantize(format="int8", target="linear"))
    program = rounded.apply(surgery.Delta(target="linear"))
    assert torch.equal(program.run(), rounded.run())
    with torch.no_grad():
        program.tensors["linear.delta.weight"].add_(1.0)
    moved = program.run()
    assert not torch.equal(moved, rounded.run())
    assert torch.equal(program.undo("delta").run(), rounded.run())
