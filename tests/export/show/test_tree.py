"""Data of a program for display, and the folding of equal blocks."""

from __future__ import annotations

import dataclasses

import pytest

import surgery
from surgery.export.show.model import model_data
from surgery.export.show.tree import build_tree
from tests.shared.stacks import program


def tree(program):
    return build_tree(model_data(program, "title"))


def named(root, name):
    return next(item for item in root.walk() if item.name == name)


def test_equal_blocks_are_one_item_and_figures_add_up():
    stack = program()
    root = tree(stack)
    assert [child.name for child in root.children] == ["embed", "blocks.0–2", "norm", "head"]
    run = named(root, "blocks.0–2")
    assert run.run
    assert [child.name for child in run.children] == ["blocks.0", "blocks.1", "blocks.2"]
    total, trainable = stack.count_parameters()
    assert (root.parameters, root.trainable) == (total, trainable)
    assert root.parameters == sum(child.parameters for child in root.children)
    assert root.bytes == 4 * total
    block = stack.base.loaded.module.blocks[0]
    assert run.children[0].parameters == sum(p.numel() for p in block.parameters())


def test_a_block_that_a_pass_changed_is_not_folded_with_the_others():
    root = tree(program().apply(surgery.Lora(target="blocks.0.up", rank=2)))
    assert [child.name for child in root.children] == ["embed", "blocks.0", "blocks.1–2", "norm", "head"]
    first = named(root, "blocks.0")
    assert first.marks == ("lora",)
    # Every value of A (2 × 16) and B (32 × 2) trains; the base is frozen.
    assert first.trainable == root.trainable == 2 * 16 + 32 * 2
    assert named(root, "blocks.1–2").marks == ()


def test_every_running_op_is_in_one_module(llama, changed):
    for each in (llama, changed):
        data = model_data(each, "llama")
        held = [op.id for item in build_tree(data).walk() if not item.run for op in item.ops]
        assert sorted(held) == sorted(op.id for op in data.ops)
        known = {op.id for op in data.ops}
        assert all(set(op.inputs) <= known and set(op.weights) <= set(data.weights) for op in data.ops)


def test_shapes_have_the_names_of_dimensions(llama):
    data = model_data(llama, "llama")
    shapes = {op.id: op.shape for op in data.ops}
    assert shapes["input_ids"] == "batch×seq"
    assert shapes["embedding"] == "batch×seq×32"
    assert not [shape for shape in shapes.values() if "s4" in shape or "s5" in shape]
    assert next(op for op in data.ops if op.role == "attn.q").module == "model.layers.0.self_attn.q_proj"


def test_ties_training_and_dtypes_of_weights(changed):
    weights = model_data(changed, "llama").weights
    embedding = weights["model.embed_tokens.weight"]
    assert embedding.tied == ("lm_head.weight",)
    assert (embedding.shape, embedding.dtype, embedding.trains) == ("101×32", "float32", False)
    adapter = weights["model.layers.1.self_attn.q_proj.lora.A"]
    assert (adapter.by, adapter.trains, adapter.shape) == ("lora", True, "4×32")
    root = tree(changed)
    assert root.parameters == changed.count_parameters()[0]


def test_the_error_of_a_quantized_weight_is_that_of_its_dequantized_values(llama, changed):
    weights = model_data(changed, "llama").weights
    path = "model.layers.0.mlp.up_proj"
    codes, scale = changed.tensors[f"{path}.quantize.codes"], changed.tensors[f"{path}.quantize.scale"]
    assert weights[f"{path}.quantize.codes"].error is not None
    assert weights[f"{path}.quantize.scale"].error is None
    # Symmetric int4 with groups of 16 along the input: at most half a step of 1/7 of the group's largest weight.
    original = llama.base.tensors[f"{path}.weight"]
    largest = original.view(64, -1, 16).abs().amax(-1, keepdim=True)
    bound = (largest / 7 / 2).expand(-1, -1, 16).norm() / original.norm()
    assert 0 < weights[f"{path}.quantize.codes"].error < bound
    assert codes.numel() > scale.numel()
    assert model_data(changed, "llama", errors=False).weights[f"{path}.quantize.codes"].error is None


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["layers.0", "layers.1", "layers.3"], ["layers.0–1", "layers.3"]),
        (["a.0", "b.1"], ["a.0", "b.1"]),
        (["h.2.mlp", "h.3.mlp"], ["h.2–3.mlp"]),
        (["h.01", "h.2"], ["h.01", "h.2"]),
    ],
)
def test_only_consecutive_numbers_fold(names, shown):
    stack = model_data(program(), "title")
    op = next(op for op in stack.ops if op.op == "gelu")
    ops = tuple(dataclasses.replace(op, id=name, module=name, inputs=()) for name in names)
    made = dataclasses.replace(stack, ops=ops, weights={}, classes={})
    assert [child.name for child in build_tree(made).children] == shown
