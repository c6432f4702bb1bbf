"""The difference of two programs: what was added, removed and swapped, and how far values moved."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.export.show import values
from surgery.export.show.compare import compare
from surgery.export.show.tree import build_tree
from surgery.export.show.values import distance, moved_values
from tests.shared.stacks import program


def changes(data, kind):
    return [op for op in data.ops if op.change == kind]


def test_a_program_does_not_differ_from_itself(llama):
    found = compare(llama, llama, ("a", "b"))
    assert not [op for op in found.ops if op.change]
    assert not [w for w in found.weights.values() if w.change or w.error]
    moved = [op.moved for op in found.ops if op.moved is not None]
    assert len(moved) > 100
    assert set(moved) == {0.0}


def test_an_adapter_moves_values_from_its_site_on():
    stack = program()
    adapted = stack.apply(surgery.Lora(target="blocks.1.down", rank=2))
    with torch.no_grad():
        for tensor in adapted.tensors.values():
            tensor.normal_(generator=torch.Generator().manual_seed(3))
    found = compare(stack, adapted, ("a", "b"))
    added = changes(found, "+")
    assert {op.by for op in added} == {"lora"}
    assert {op.site for op in added} == {"blocks.1.down"}
    root = build_tree(found)
    moved = {item.path: item.moved for item in root.walk()}
    assert moved["blocks.0"] == 0
    assert moved["blocks.1.up"] == 0
    assert moved["blocks.1"] > 0.01
    assert moved["blocks.2"] > 0.01
    # The number for the model is that of its output, computed here from both programs.
    before, after = stack.run(), adapted.run()
    assert moved[""] == pytest.approx(float((after - before).abs().max() / before.abs().max()), rel=1e-5)
    weights = found.weights
    assert weights["blocks.1.down.lora.A"].change == "+"
    assert not weights["blocks.1.down.weight"].change


def test_undoing_is_the_same_with_removed_ops():
    stack = program()
    adapted = stack.apply(surgery.Lora(target="blocks.1.down", rank=2))
    found = compare(adapted, stack, ("a", "b"), values=False)
    removed = changes(found, "-")
    assert len(removed) == len(changes(compare(stack, adapted, ("a", "b"), values=False), "+"))
    assert {op.by for op in removed} == {"lora"}
    known = {op.id for op in found.ops}
    assert len(known) == len(found.ops)
    assert all({*op.inputs, *op.lost} <= known for op in found.ops)
    # The op that read the adapter's output is connected to it still, as a removed edge.
    assert [op.lost for op in found.ops if op.lost and op.change != "-"]
    assert found.weights["blocks.1.down.lora.A"].change == "-"
    assert all(op.moved is None for op in found.ops)


def test_a_folded_norm_is_swapped_and_its_values_compared():
    net = surgery.load("py:tests.shared.models:convnet")
    norm = net.base.loaded.module[1]
    with torch.no_grad():
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(4))
        norm.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(5))
    found = compare(net, net.apply(surgery.FoldBatchnorm()), ("a", "b"))
    (swapped,) = changes(found, "s")
    assert swapped.op == "conv2d"
    assert swapped.was.startswith("batch_norm")
    assert swapped.by == "fold-batchnorm"
    # Folding is exact up to rounding in float32, with sums of 27 products.
    assert swapped.moved < 1e-5
    assert "conv2d" in {op.op for op in changes(found, "-")}


def test_quantized_weights_have_errors_against_the_originals(llama, changed):
    found = compare(llama, changed, ("a", "b"), values=False)
    codes = [w for w in found.weights.values() if w.name.endswith("quantize.codes")]
    assert len(codes) == 6
    assert all(w.change == "+" and 0.03 < w.error < 0.15 for w in codes)
    assert found.weights["model.layers.0.mlp.up_proj.weight"].change == "-"


def test_trained_weights():
    stack = program()
    full = stack.apply(surgery.Full(target="head"))
    module = full.module()
    with torch.no_grad():
        dict(module.named_parameters())["head.weight"].mul_(1.1)
    found = compare(stack, full, ("a", "b"), values=False).weights["head.weight"]
    assert found.change == "~"
    assert found.error == pytest.approx(0.1, rel=1e-4)


def test_inputs_that_do_not_fit_are_said(llama):
    stack = program()
    found = compare(llama, stack, ("a", "b"))
    assert dict(found.facts)["values"].startswith("not compared: ")
    assert all(op.moved is None for op in found.ops)


def test_given_data_decide(llama, changed):
    args, kwargs = llama.example_inputs
    other = {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % 101}
    one = {op.id: op.moved for op in compare(llama, changed, ("a", "b")).ops}
    both = {
        op.id: op.moved
        for op in compare(llama, changed, ("a", "b"), data=[(args, kwargs), (args, other)]).ops
    }
    assert one != both
    assert all(both[name] >= value for name, value in one.items() if value is not None)


def test_without_room_only_module_outputs_are_compared(llama, changed, monkeypatch):
    every = compare(llama, changed, ("a", "b"))
    monkeypatch.setattr(values, "MOST_BYTES", 20_000)
    some = compare(llama, changed, ("a", "b"))
    assert "do not fit into memory" in dict(some.facts)["values"]
    full, part = ({op.id: op.moved for op in each.ops if op.moved is not None} for each in (every, some))
    assert 10 < len(part) < len(full)
    assert all(full[name] == value for name, value in part.items())
    outputs = {item.path: item.moved for item in build_tree(some).walk()}
    assert outputs["model.layers.0"] == {i.path: i.moved for i in build_tree(every).walk()}["model.layers.0"]


class Writes(torch.nn.Module):
    """Changes a value in place after another op has read it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        y = x * 2
        z = y + 1
        y.mul_(self.scale)
        return z + y


def writes():
    return Writes(3.0), (torch.ones(2, 3),)


def writes_more():
    return Writes(4.0), (torch.ones(2, 3),)


def test_in_place_ops_do_not_change_what_was_held():
    a, b = (surgery.load(f"py:tests.export.show.test_compare:{name}") for name in ("writes", "writes_more"))
    assert any("mul_" in str(node.target) for node in a.graph.nodes), "torch.export made this functional"
    moved = {op.op: op.moved for op in compare(a, b, ("a", "b")).ops}
    assert moved["mul"] == 0
    assert moved["mul_"] == pytest.approx(1 / 3)


def test_distance():
    a = torch.tensor([1.0, -4.0])
    assert distance(a, a) == 0
    assert distance(a, a + torch.tensor([0.0, 1.0])) == pytest.approx(0.25)
    assert distance(a, torch.zeros(3)) is None
    assert distance(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    infinite = torch.tensor([0.0, -torch.inf])
    assert distance(infinite, infinite) == 0
    assert distance(infinite, torch.zeros(2)) == 1
    assert distance(torch.zeros(2), torch.ones(2)) == 1
    assert distance(torch.zeros(0), torch.zeros(0)) == 0


def test_values_are_taken_from_the_nodes_that_are_named(llama):
    found, whole = moved_values(llama, llama, [("input_ids", "input_ids")], ())
    assert found == {"input_ids": 0.0}
    assert whole
