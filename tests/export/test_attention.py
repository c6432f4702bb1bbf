"""Attention in the ONNX file: torch's outputs, also for fully masked rows, without a pass that removes NaNs."""

from __future__ import annotations

import itertools

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.export.runtime import OnnxModel
from surgery.export.unfused_sums import keep_sums_apart
from tests.passes.quantize.test_smooth_carried import optimised

BATCH, HEADS, QUERIES, KEYS, SIZE = 2, 4, 5, 7, 8
# One product of 8 terms and one of 7, of numbers about 1, in float32: each within some 1e-6; an order more for safety.
NEAR = 1e-5


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value, mask=None):
        return F.scaled_dot_product_attention(query, key, value, mask, **self.options)


def tensors(heads=HEADS, queries=QUERIES, keys=KEYS, seed=0):
    torch.manual_seed(seed)
    shapes = (HEADS, queries), (heads, keys), (heads, keys)
    return [torch.randn(BATCH, count, places, SIZE) for count, places in shapes]


def exported(module, args, tmp_path, **options):
    """The file and its ops."""
    path = tmp_path / "m.onnx"
    surgery.capture(module, tuple(args), **options).export(path)
    return path, kinds(onnx.load(str(path)).graph)


def kinds(graph):
    return [node.op_type for node in graph.node]


def run(path, args):
    model = OnnxModel(path)
    (found,) = model.run(dict(zip(model.inputs, args, strict=True))).values()
    return found


def masks():
    """Masks that exclude some keys, with one fully masked row."""
    torch.manual_seed(1)
    seen = torch.rand(BATCH, 1, QUERIES, KEYS) > 0.4
    seen[..., 0] = True
    seen[0, :, 2] = False
    floats = torch.randn(seen.shape).masked_fill(~seen, float("-inf"))
    return {"bool": seen, "float": floats}


@pytest.mark.parametrize(
    ("kind", "heads", "scale"), itertools.product(("bool", "float"), (HEADS, 2, 1), (None, 0.3, -0.5))
)
def test_masked_attention_is_torchs(kind, heads, scale, tmp_path):
    mask = masks()[kind]
    module = Attend(scale=scale, enable_gqa=heads != HEADS)
    path, ops = exported(module, [*tensors(heads), mask], tmp_path)
    fresh = [*tensors(heads, seed=3), mask]
    wanted, found = module(*fresh), run(path, fresh)
    assert wanted[0, :, 2].abs().max() == 0
    assert wanted[0, :, 1].abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=NEAR)
    assert found[0, :, 2].abs().max() == 0
    assert "IsNaN" not in ops
    assert "Expand" not in ops


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_half_precision_rows_that_see_nothing_are_zeros(kind, tmp_path):
    """Scores of about -60 plus the lowest float16 would be -inf, and the row NaN."""
    query, key, value = (x.half() for x in tensors())
    mask = masks()[kind]
    given = [query * 30, key, value, mask if kind == "bool" else mask.half()]
    path, _ = exported(Attend(), given, tmp_path)
    found, wanted = run(path, given), Attend()(*given)
    assert found[0, :, 2].abs().max() == 0
    # A score of 60 has steps of 1/32 in float16, which is e to that power in a weight: 3% of values of about 2.
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.1)


@pytest.mark.parametrize(("causal", "heads"), itertools.product((True, False), (HEADS, 2)))
def test_attention_without_a_mask_is_torchs(causal, heads, tmp_path):
    module = Attend(is_causal=causal, enable_gqa=heads != HEADS)
    path, ops = exported(module, tensors(heads), tmp_path)
    fresh = tensors(heads, seed=3)
    torch.testing.assert_close(run(path, fresh), module(*fresh), rtol=0, atol=NEAR)
    assert ops.count("Mul") <= 2  # no product for rows that see nothing: there are none


@pytest.mark.parametrize("causal", [True, False])
def test_other_lengths_run(causal, tmp_path):
    """The causal mask and the shapes of grouped queries follow the inputs, not the example."""
    module = Attend(is_causal=causal, enable_gqa=True)
    path, _ = exported(
        module,
        tensors(2, 6, 6),
        tmp_path,
        dynamic={n: {2: "places"} for n in ("query", "key", "value")},
    )
    for length in (3, 17):
        fresh = tensors(2, length, length, seed=length)
        torch.testing.assert_close(run(path, fresh), module(*fresh), rtol=0, atol=NEAR)


def test_one_mask_serves_every_layer(tmp_path):
    """The float bias and the set of unmasked rows are computed once for all layers."""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))

        def forward(self, x, mask):
            for layer in self.layers:
                x = layer(F.scaled_dot_product_attention(x, x, x, mask))
            return x

    (x, _, _), mask = tensors(), torch.rand(BATCH, 1, QUERIES, QUERIES) > 0.3
    _, ops = exported(Layers(), [x, mask], tmp_path)
    assert ops.count("Softmax") == 3
    assert (ops.count("Where"), ops.count("ReduceSum"), ops.count("Greater")) == (1, 1, 1)


class Residual(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.map, self.norm = nn.Linear(16, 16, dtype=dtype), nn.LayerNorm(16, dtype=dtype)

    def forward(self, x):
        return self.norm(self.map(x) + x)


def test_onnxruntime_leaves_the_sum_of_a_residual_apart(tmp_path):
    """With the same names of dimensions the same file is fused, so the test would detect it."""
    path, ops = exported(Residual(), [torch.randn(2, 3, 16)], tmp_path)
    assert "Sum" not in ops
    assert ops.count("Add") == 2
    assert "SkipLayerNormalization" not in kinds(optimised(path))
    model = onnx.load(str(path))
    for value in model.graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.removesuffix(".skip")
    onnx.save(model, str(path))
    assert "SkipLayerNormalization" in kinds(optimised(path))


def test_a_static_sum_of_a_residual_stays_apart_too(tmp_path):
    path, ops = exported(Residual(), [torch.randn(2, 3, 16)], tmp_path, dynamic={})
    assert ops.count("Sum") == 1
    assert "SkipLayerNormalization" not in kinds(optimised(path))


def test_half_precision_keeps_its_adds(tmp_path):
    _, ops = exported(Residual(torch.float16), [torch.randn(2, 3, 16, dtype=torch.float16)], tmp_path)
    assert "Sum" not in ops
    assert ops.count("Add") == 2


def test_a_sum_that_no_norm_takes_in_stays(tmp_path):
    import onnx_ir

    path, _ = exported(nn.Linear(4, 4), [torch.randn(1, 2, 4)], tmp_path)
    assert keep_sums_apart(onnx_ir.load(path)) == 0
