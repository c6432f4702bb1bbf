"""The gate of files that round activations: no seed fails, a wrong file is found, data and decisions are judged."""

from __future__ import annotations

import json

import numpy
import onnx
import pytest
import torch
from torch import nn

import surgery
from surgery.cli import main
from surgery.common.errors import ExportError
from surgery.export import rounded_parity
from surgery.export.program import source_of
from surgery.export.rounded_parity import Judged, judge
from surgery.export.runtime import OnnxModel
from surgery.export.verify import open_side, verify


def classifier():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    return module.eval(), (torch.randn(4, 32),)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A program with rounded inputs, and its file."""
    path = tmp_path_factory.mktemp("dynamic") / "model.onnx"
    program = surgery.capture(*classifier()).apply(surgery.Quantize(target="all", format="int8-dynamic"))
    return program, path, program.export(path)


def rows(count, seed):
    return [((torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)),), {})]


def changed_file(path, into, change):
    """A copy of a file with one changed initializer."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        value = change(tensor.name, onnx.numpy_helper.to_array(tensor))
        if value is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(model, into)
    return into


def test_no_seed_fails(dynamic):
    """Single values move by whole levels, but the size of all changes together hardly depends on the inputs."""
    program, path, report = dynamic
    assert report.parity.error < 1e-5  # without rounding
    model, source = OnnxModel(path), source_of(program)
    ratios = []
    for seed in range(12):
        found = judge(model.run, source, rows(8, seed))
        assert found.ok
        ratios.append(found.worst.error / found.worst.own)
    assert min(ratios) > 0.7
    assert max(ratios) < 1.4


@pytest.mark.parametrize("what", ["scale", "codes", "bias"])
def test_a_wrong_file_is_found(what, dynamic, tmp_path):
    program, path, _ = dynamic

    def change(name, value):
        if not name.startswith("2.") or not name.endswith(what):
            return None
        if what == "bias":  # far below rounding
            return value + numpy.float32(1e-3)
        return (
            value * numpy.float32(1.2)
            if what == "scale"
            else numpy.where(value > 40, 40, value).astype("int8")
        )

    wrong = changed_file(path, tmp_path / "wrong.onnx", change)
    result = verify(program, open_side(str(wrong), None))
    assert not result.agree
    assert result.divergence is not None
    assert verify(program, open_side(str(path), None)).agree


def test_the_unrounded_file_is_compared_at_full_tolerance(dynamic, tmp_path, monkeypatch):
    """A bias that is off by a thousandth is far below rounding, and found all the same."""
    program, _, _ = dynamic
    save = onnx.save

    def wrong(model, path, **options):
        for tensor in model.graph.initializer:
            if tensor.name == "4.bias":
                value = onnx.numpy_helper.to_array(tensor) + numpy.float32(1e-3)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        save(model, path, **options)

    monkeypatch.setattr(onnx, "save", wrong)
    with pytest.raises(ExportError, match="without activation rounding differs"):
        program.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_decisions_are_counted_on_data_alone(dynamic):
    program, path, _ = dynamic
    model, source = OnnxModel(path), source_of(program)
    assert judge(model.run, source, rows(64, 0)).worst.decisions == 0
    found = judge(model.run, source, rows(64, 0), given=True)
    assert found.worst.decisions == 64
    assert "on 64 rows of data" in found.said
    assert (
        f"{found.worst.changed} of 64 decisions change, in the program {found.worst.own_changed}"
        in found.said
    )
    # Twice the program's own and 5%: the size of the error alone would pass here.
    assert Judged("logits", 0.02, 0.02, 100, 10, 3).ok(0.05)
    assert not Judged("logits", 0.02, 0.02, 100, 12, 3).ok(0.05)
    assert not Judged("logits", 0.2, 0.02, 100, 0, 0).ok(0.05)
    assert Judged("logits", 0.2, 0.02, 100, 0, 0).ok(0.2)


def sensitive():
    """Every second input is a thousand times as large and has no weight, so common levels leave little of the rest."""
    torch.manual_seed(0)
    layer, scale = nn.Linear(64, 32), torch.ones(64)
    scale[1::2] = 1000
    with torch.no_grad():
        layer.weight[:, 1::2] = 0

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.register_buffer("scale", scale)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x * self.scale)

    return Scaled().eval(), (torch.randn(4, 64),)


def test_what_onnxruntime_rounds_by_itself_is_judged(tmp_path):
    """int8 weights alone: MatMulNBits rounds the inputs in a default session, which is what users run."""
    program = surgery.capture(*sensitive()).apply(surgery.Quantize(target="all", format="int8"))
    with pytest.raises(
        ExportError, match=r"onnxruntime rounds inputs .* moves by .*qdq_matmulnbits_accuracy_level"
    ):
        program.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    report = program.export(tmp_path / "model.onnx", tolerance=1.0)
    assert report.parity.rounding.runtime
    assert report.parity.rounding.worst.error > rounded_parity.RUNTIME_TOLERANCE
    exact = OnnxModel(tmp_path / "model.onnx", config={"session.qdq_matmulnbits_accuracy_level": "1"})
    x = program.example_inputs[0][0]
    # Sums of 64 products of numbers about 1, in another order.
    torch.testing.assert_close(exact.run({"x": x})["output"], program.run(x), rtol=1e-4, atol=1e-5)


def test_command_line(tmp_path, capsys):
    ref, out = "py:tests.export.test_rounded_parity:named", str(tmp_path / "small")
    data = tmp_path / "data.npz"
    numpy.savez(data, x=torch.randn(50, 32, generator=torch.Generator().manual_seed(5)).numpy())

    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        said = capsys.readouterr()
        assert ended.value.code == code, said
        return said.out

    run("apply", ref, "--pass", "quantize", "--target", "all", "--format", "int8-dynamic", "-o", out)
    own = ("--base", ref)
    said = " ".join(run("export", out, *own, "--data", data, "-o", tmp_path / "m.onnx").split())
    assert "rounded activations: on 50 rows of data they move 'output' by" in said
    assert "of 50 decisions change" in said
    said = run("verify", out, tmp_path / "m.onnx", *own, "--data", data, "--json")
    assert json.loads(said)["rounding"]["rows"] == 50
    assert "agree: rounded activations" in " ".join(run("verify", out, tmp_path / "m.onnx", *own).split())


def named():
    module, (x,) = classifier()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    return Named(), {"x": x}
