"""Dynamic dimensions: ranges as text and derived from the code, recurrent layers over time, inputs that stay static."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import surgery
from surgery.capture import dynamic_axes
from surgery.capture.check import difference
from surgery.capture.ranges import named_range
from surgery.common.errors import CaptureError
from surgery.export.runtime import OnnxModel


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(5, 7, **options)
        self.head = nn.Linear(7 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0])


class Pooled(nn.Module):
    """Strided and pooled: at least 19 pixels of a side leave more than one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second, self.head = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 2)
        return self.head(self.second(x).relu().mean((2, 3)))


class UpAndDown(nn.Module):
    """A residual around a stride and its inverse, for even sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.down(x))


def noted(module, inputs, dynamic=None):
    """The capture and its warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        program = surgery.capture(module.eval(), inputs, dynamic)
    said = [str(each.message) for each in found]
    return program, [line for line in said if "limited" in line or "fixed" in line]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"batch_first": True, "bidirectional": True, "num_layers": 2}),
        ("GRU", {}),
        ("RNN", {"batch_first": True}),
        ("LSTM", {"proj_size": 7, "hidden_size": 7}),
    ],
)
def test_time_is_dynamic_in_recurrent_layers(kind, options):
    torch.manual_seed(0)
    hidden = options.pop("hidden_size", None)
    if hidden:
        module = Recurrent("LSTM")
        module.cells, module.head = nn.LSTM(5, 9, proj_size=4), nn.Linear(4, 3)
    else:
        module = Recurrent(kind, **options)
    axes = {0: "batch", 1: "time"} if options.get("batch_first") else {0: "time", 1: "batch"}
    program = surgery.capture(module.eval(), (torch.randn(3, 4, 5),), {"x": axes})
    assert dynamic_axes(program.captured) == {"x": axes}
    for shape in ((2, 9, 5), (6, 2, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.run(x), module(x))  # the same kernels


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        pytest.param("GRU", {}, marks=pytest.mark.slow),
        ("RNN", {"bidirectional": True, "num_layers": 2}),
        pytest.param("RNN", {"nonlinearity": "relu", "bias": False}, marks=pytest.mark.slow),
    ],
)
def test_recurrent_layers_over_time_in_a_file(kind, options, tmp_path):
    torch.manual_seed(0)
    module = Recurrent(kind, batch_first=True, **options).eval()
    program = surgery.capture(module, (torch.randn(3, 4, 5),), {"x": {0: "batch", 1: "time"}})
    report = program.export(tmp_path / "model.onnx")
    assert report.outputs == {"output": ("batch", "time", 3)}
    x = torch.randn(1, 30, 5)
    found = OnnxModel(tmp_path / "model.onnx").run({"x": x})["output"]
    # 30 steps of sums of a dozen values, in another order.
    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)


def test_ranges_are_derived_from_the_code():
    program, said = noted(Pooled(), (torch.randn(2, 3, 32, 40),), {"x": {0: "batch", 2: "h", 3: "w"}})
    assert len(said) == 2
    assert "h is limited to 19 or more, as the model's code requires" in said[0]
    module = program.base.loaded.module
    for side in (19, 27, 64):
        x = torch.randn(3, 3, side, side + 1)
        torch.testing.assert_close(program.run(x), module(x))
    program, said = noted(UpAndDown(), (torch.randn(2, 3, 8, 10),), {"x": {0: "batch", 2: "h", 3: "w"}})
    assert "h is limited to multiples of 2" in said[0]
    assert program.run(torch.randn(1, 3, 14, 6)).shape == (1, 3, 14, 6)


def test_ranges_as_text():
    axes = {0: "batch", 2: "h=20..64", 3: "w=20.."}
    program, said = noted(Pooled(), (torch.randn(2, 3, 32, 40),), {"x": axes})
    assert not said
    assert {a: str(d) for a, d in dynamic_axes(program.captured)["x"].items()} == {0: "batch", 2: "h", 3: "w"}
    program, said = noted(UpAndDown(), (torch.randn(2, 3, 8, 12),), {"x": {2: "h=4..64/4", 3: "w=..64/2"}})
    assert not said
    assert named_range("h=8..")[1].min == 8
    with pytest.raises(CaptureError, match="two ranges"):
        surgery.capture(UpAndDown(), (torch.randn(2, 3, 8, 8),), {"x": {2: "h=4..8/2", 3: "h=4..16/2"}})
    for wrong in ("h=8..2", "h=8", "h=a..b", "2h", "h=1..2/0"):
        with pytest.raises(CaptureError, match=r"dimension|empty range"):
            named_range(wrong)


@pytest.mark.parametrize("sizes", [(3, 5), (1, 1)])
def test_inputs_that_stay_static_are_said(sizes):
    class Sums(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a.sum(0) + b.sum(0)

    program, said = noted(Sums(), tuple(torch.randn(size, 4) for size in sizes))
    assert not dynamic_axes(program.captured)
    assert len(said) == 1
    assert f"(a {sizes[0]}, b {sizes[1]})" in said[0]
    assert "dynamic={'a': {0: 'batch'}}" in said[0]
    assert not noted(Sums(), (torch.randn(3, 4), torch.randn(3, 4)))[1]
    assert not noted(Sums(), (torch.randn(3, 4), torch.randn(5, 4)), {})[1]


def test_values_that_are_not_finite_are_counted():
    """A difference of NaN is not zero."""
    finite, odd = torch.ones(4), torch.tensor([1.0, float("nan"), 1.0, float("inf")])
    assert "0 values that are inf or NaN in the module and 2 in the capture, of 4" in difference(
        finite, odd, 1
    )
    assert difference(odd, odd.clone(), 1) is None
    assert "differs by 1 (allowed" in difference(finite, finite + 1, 1)
