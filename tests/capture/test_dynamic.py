"""Dynamic dimensions: ranges as text and derived from the code, recurrent layers over time, inputs that stay static."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.capture import dynamic_axes, fresh_inputs, from_module, named_sizes, trace
from surgery.capture.check import difference
from surgery.capture.dimensions import Dimensions
from surgery.capture.hf import from_model
from surgery.capture.ranges import named_range
from surgery.common.errors import CaptureError, ExportError, PassError
from surgery.export.runtime import OnnxModel
from surgery.export.verify import verify


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


class Branching(nn.Module):
    """A branch at a batch of 64, as diffusers has it, and a crop from a table of 24 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(4, 8), nn.Parameter(torch.randn(24, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if x.shape[0] >= 64:
            y = y.contiguous()
        top = (24 - x.shape[1]) // 2
        return y + self.table[top : top + x.shape[1]]


class Looping(nn.Module):
    """A loop over the batch makes it a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.linear(row) for row in x])


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


def test_a_range_that_torch_suggests_is_taken_within_bounds():
    torch.manual_seed(0)
    program, said = noted(Branching(), (torch.randn(2, 6, 4),), {"x": {0: "batch=1..100", 1: "seq"}})
    assert "batch is limited to at most 63, as the model's code requires" in said[0]
    assert "seq is limited to at most 24, as the model's code requires" in said[1]
    assert len(said) == 2
    module = program.base.loaded.module
    for shape in ((1, 24, 4), (63, 3, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.run(x), module(x))  # the same kernels
    with pytest.raises(
        CaptureError, match="size 64 of 'batch' does not fit the model, which takes at most 63"
    ):
        fresh_inputs(program.captured, {"batch": 64})


def test_a_batch_that_the_code_fixes():
    """An example of a caller is refused, one of a loader of transformers is fixed with a note."""
    with pytest.raises(CaptureError, match=r"fixes dimension 'batch' to the constant 3"):
        surgery.capture(Looping(), (torch.randn(3, 4),), {"x": {0: "batch"}})
    loaded = from_module(Looping(), (torch.randn(3, 4),), {"x": {0: "batch"}})
    captured = trace(replace(loaded, may_fix=frozenset({"batch"})))
    assert not dynamic_axes(captured)
    assert (
        "batch is fixed at 3, because the model's code fixes it (for example by a loop" in captured.notes[0]
    )
    assert "--example batch=N" in captured.notes[0]


def test_multiples_have_the_name_of_the_dimension(tmp_path):
    """In views, in files and in errors: torch knows `h` as 2 times `_h`."""
    torch.manual_seed(0)
    module = UpAndDown().eval()
    program, said = noted(module, (torch.randn(2, 3, 8, 10),), {"x": {0: "batch", 2: "h=4..64", 3: "w"}})
    assert "h is limited to multiples of 2 from 4 up to 64" in said[0]
    assert named_sizes(program.captured) == {"batch": 2, "h": 8, "w": 10}
    node = program.graph.find_nodes(op="placeholder")[0]
    assert Dimensions(program.captured).shape(node.meta["val"].shape) == "batch×3×h×w"
    report = program.export(tmp_path / "model.onnx")
    assert report.outputs == {"output": ("batch", 3, "h", "w")}
    model = OnnxModel(tmp_path / "model.onnx")
    x = torch.randn(3, 3, 14, 6)
    # Sums of 27 products in another order.
    torch.testing.assert_close(model.run({"x": x})["output"], module(x), rtol=1e-5, atol=1e-5)
    ranges = {"h": {"step": 2, "min": 4, "max": 64}, "w": {"step": 2}}
    assert json.loads(model.metadata["surgery.ranges"]) == ranges
    odd = torch.randn(2, 3, 9, 6)
    said_of_odd = r"axis 2 of 'x' has the size 9, but 'h' takes multiples of 2 from 4 up to 64"
    with pytest.raises(ExportError, match=said_of_odd):
        model.run({"x": odd})
    with pytest.raises(PassError, match=said_of_odd):
        program.run(odd)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Wav2Vec2Conformer", "samples is limited to multiples of 20 from 400"),
        ("SEWD", "samples is limited to multiples of 40 from 400"),
    ],
)
def test_ranges_of_samples(kind, said):
    """The loader gives a range of samples, and the model's code a narrower one."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), vocab_size=20, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, **({"squeeze_factor": 2} if kind == "SEWD" else {}),
    )  # fmt: skip
    captured = trace(from_model(getattr(transformers, f"{kind}ForCTC")(config)))
    assert captured.notes[0].startswith(said)


def test_a_size_that_must_be_even_is_shown_by_its_name_and_compared_in_files(tmp_path):
    program, _ = noted(UpAndDown(), (torch.randn(2, 3, 8, 10),), {"x": {0: "batch", 2: "h", 3: "w"}})
    named = Dimensions(program.captured)
    shapes = [named.shape(n.meta["val"].shape) for n in program.graph.nodes if n.op == "call_function"]
    assert {text.split("×", 2)[2] for text in shapes} == {"h/2×w/2", "h×w"}
    program.export(tmp_path / "model.onnx")
    side = OnnxModel(tmp_path / "model.onnx")
    # Two files are compared without a program, at a size that the network takes: an odd one is not.
    report = verify(side, OnnxModel(tmp_path / "model.onnx"))
    assert report.agree
    assert [each.shape[2:] for each in report.outputs] == [(8, 8)]


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
