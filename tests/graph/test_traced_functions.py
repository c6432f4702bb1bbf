"""Rewriter.trace: the ops of a torch function, at every batch size, traced once for a shape."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.api import LINEAR, PassError, RewritePass, TensorSpec

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
CALLS: list[str] = []


def centred(value, gain, weight):
    """Reads a dynamic size, a linear map, a number and a parameter."""
    CALLS.append("centred")
    rows = value.shape[0]
    mean = value.reshape(rows, -1).sum(1, keepdim=True) / value.shape[-1]
    return value + weight * (F.linear(value - mean, torch.diag(gain)) - value)


class Centre(RewritePass):
    name: ClassVar[str] = "centre"
    on = (LINEAR,)

    def tensors(self, site):
        return {"g": TensorSpec((site.out_features,), nn.init.normal_)}

    @property
    def numerics(self):
        return surgery.api.changes("a test")

    def rewrite(self, site, g):
        return g.trace(centred, g.output, g["g"], g.weight)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def program():
    return surgery.capture(net(), (X,), dynamic={"input": {0: "batch"}})


def test_it_computes_the_function_at_every_batch_size():
    adapted = program().apply(Centre(target="2"))
    first, act, second, _, last = net()
    for x in (X, X[:1], torch.cat([X, X])):
        want = last(torch.tanh(centred(second(act(first(x))), adapted.tensors["2.centre.g"], 1.0)))
        # fp32: the same ops.
        assert torch.allclose(adapted.run(x), want, atol=1e-6)
    assert torch.ops.aten.linear.default in {n.target for n in adapted.graph.nodes}


def test_it_is_traced_once_for_a_shape():
    CALLS.clear()
    adapted = program().apply(Centre(target="0,2"), verify=False)
    # One graph is built, with two sites of one shape.
    assert len(CALLS) == 1
    CALLS.clear()
    adapted.apply(Centre(target="4", label="b"), verify=False)
    assert len(CALLS) == 1


def test_a_closure_is_traced_at_every_site():
    class Closure(Centre):
        name = "closure"

        def rewrite(self, site, g):
            shift = 1.0 if site.path == "0" else 2.0
            return g.trace(lambda value: value + shift, g.output)

        def tensors(self, site):
            return {}

    adapted = program().apply(Closure(target="0,2"))
    first, act, second, _, last = net()
    want = last(torch.tanh(second(act(first(X) + 1)) + 2))
    assert torch.allclose(adapted.run(X), want, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda x: x if float(x.sum()) > 0 else -x,
            r"cannot be traced into ops \(\w+: .*\); write it in torch ops",
        ),
        (lambda x: x + torch.ones(3), r"creates a tensor; declare it in `tensors`"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), r"creates a tensor; declare it in `tensors`"),
        (lambda x: (x, x), r"must return one tensor"),
        (lambda x: 3, r"must return one tensor"),
    ],
)
def test_what_cannot_be_inserted_is_refused(function, said):
    class Wrong(Centre):
        name = "wrong"

        def rewrite(self, site, g):
            return g.trace(function, g.output)

    with pytest.raises(PassError, match=said):
        program().apply(Wrong(target="4"))
