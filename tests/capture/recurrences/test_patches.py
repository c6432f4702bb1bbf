"""The hook with which a plugin replaces the loop of its own model."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import surgery
from surgery.capture import dynamic_axes
from surgery.common.errors import CaptureError, PluginError
from surgery.common.hooks import hookimpl
from surgery.common.plugins import make_plugin_manager

DYNAMIC = {"x": {0: "batch", 1: "seq"}}


class Decaying(nn.Module):
    """S = 0.9 S + x, by a loop over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def recur(self, x):
        state, outs = x[:, 0] * 0, []
        for step in range(x.shape[1]):
            state = 0.9 * state + x[:, step]
            outs.append(state)
        return torch.stack(outs, 1)

    def forward(self, x):
        return self.out(self.recur(self.inner(x)))


def recur(x):
    """Each channel is a head with a key of width 1, whose value is the input."""
    one = torch.ones_like(x[..., :1, None])
    decay = torch.full_like(x, 0.9).log().unsqueeze(-1)
    return surgery.api.programs.linear_attention(one, one, x.unsqueeze(-1), decay, None, None, "gated")[
        0
    ].squeeze(-1)


@contextlib.contextmanager
def patch(model):
    layers = [layer for layer in model.modules() if isinstance(layer, Decaying)]
    for layer in layers:
        layer.recur = recur
    try:
        yield
    finally:
        for layer in layers:
            del layer.recur


class Patches:
    @hookimpl
    def surgery_capture_patches(self):
        return [patch]


def test_a_plugin_replaces_a_loop():
    torch.manual_seed(0)
    model, x = Decaying(), torch.randn(2, 5, 4)
    with pytest.raises(CaptureError, match="seq"):
        surgery.capture(model, x, DYNAMIC)
    program = surgery.capture(model, x, DYNAMIC, plugins=make_plugin_manager(plugins=(Patches(),)))
    assert dynamic_axes(program.captured) == DYNAMIC
    assert "recur" not in vars(model)
    longer = torch.randn(3, 77, 4)
    with torch.no_grad():
        torch.testing.assert_close(program.run(longer), model(longer), rtol=1e-5, atol=1e-5)
    # The live model keeps its own loop; only the plan is made on the capture.
    live = Decaying()
    applied = surgery.apply_(
        live, surgery.Lora(target="inner", rank=2), inputs=x, dynamic=DYNAMIC, plugins=program.base.plugins
    )
    assert [site.path for site in applied.sites] == ["inner", "out"]


def test_a_wrong_result_is_named():
    class Wrong:
        @hookimpl
        def surgery_capture_patches(self):
            return patch

    with pytest.raises(PluginError, match="surgery_capture_patches; return a list of functions"):
        make_plugin_manager(plugins=(Wrong(),))
