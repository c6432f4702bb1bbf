"""int8 products on processors without VNNI: codes that do not overflow, their loss, and the check at export.

Those processors add two neighbouring products in 16 bits. `saturating` computes products as they do; which columns
onnxruntime pairs was measured with its AVX2 kernels, one pair at a time, under an emulator of such a processor.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import surgery
from surgery.cli import main
from surgery.common.errors import ExportError, PassError
from surgery.export import saturation
from surgery.passes.quantize.codes import decode, encode
from surgery.passes.quantize.gptq import gptq
from surgery.passes.quantize.pairs import overflowing

DYNAMIC = {"target": "all", "format": "int8-dynamic"}


def saturating(x, weight):
    """The product of uint8 x (M, K) and int8 weight (K, N) with pairs of products added in 16 bits."""
    even = x.shape[1] % 2
    x, weight = (
        np.pad(a.astype(np.int64), p) for a, p in ((x, ((0, 0), (0, even))), (weight, ((0, even), (0, 0))))
    )
    products = x[:, :, None] * weight[None]
    pairs = products.reshape(len(x), -1, 2, weight.shape[1]).sum(2)
    return pairs.clip(-32768, 32767).sum(1)


def worst_inputs(weight):
    """uint8 inputs that give the largest and the smallest sum of every column of a weight (K, N)."""
    return np.concatenate([np.where(weight > 0, 255, 0).T, np.where(weight < 0, 255, 0).T]).astype(np.uint8)


def saturates(weight):
    given = worst_inputs(weight)
    return bool((saturating(given, weight) != given.astype(np.int64) @ weight.astype(np.int64)).any())


def matrices():
    torch.manual_seed(0)
    yield "normal", torch.randn(48, 96)
    yield "odd", torch.rand(16, 33)
    yield "equal", torch.full((4, 10), -0.3)
    yield "one", torch.rand(5, 1)
    yield "zeros", torch.rand(8, 32) * (torch.rand(8, 32) > 0.5)
    yield "half", torch.rand(8, 32).half()


@pytest.mark.parametrize("by", ["nearest", "gptq"])
def test_no_codes_overflow(by):
    for name, matrix in matrices():
        order = torch.arange(matrix.shape[1])
        columns = matrix.shape[1]
        if by == "gptq":
            x = torch.randn(200, columns).double()
            wide, found = (gptq(matrix, x.T @ x, "int8", columns, pairs=p) for p in (None, order))
        else:
            wide, found = (encode(matrix, "int8", columns, pairs=p) for p in (None, order))
        assert not overflowing(found.codes).any(), name
        assert not saturates(found.codes.numpy().T), name
        if name not in ("one",):
            assert saturates(wide.codes.numpy().T), name
        # Half a step of 7 bits at the most; gptq may move a value further to compensate others.
        step = matrix.float().abs().amax(1, keepdim=True) / 63.5
        moved = (decode(found.codes, found.scale, None, "int8", columns) - matrix.float()).abs()
        if by == "nearest":
            assert float((moved.square().sum(1) / (step * 0.51).square().sum(1)).max()) <= columns
            assert not found.codes[matrix == 0].any()


def test_the_loss_lies_between_eight_and_seven_bits():
    torch.manual_seed(0)
    matrix, order = torch.randn(64, 384), torch.arange(384)

    def error(codes, scale):
        return float((codes * scale - matrix).norm() / matrix.norm())

    eight, paired = encode(matrix, "int8", 384), encode(matrix, "int8", 384, pairs=order)
    seven = matrix.abs().amax(1, keepdim=True) / 63.5
    errors = [
        error(eight.codes, eight.scale),
        error(paired.codes, paired.scale),
        error((matrix / seven).round(), seven),
    ]
    # Measured on normal weights: 0.81%, 1.09% and 1.62%.
    assert errors[0] < errors[1] < 0.72 * errors[2]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.grouped = nn.Conv2d(6, 8, (3, 2), groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.many = nn.Conv2d(8, 16, 2, groups=8)
        self.line = nn.Conv1d(16, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.grouped(torch.relu(self.conv(x))))))
        x = torch.relu(self.line(torch.relu(self.many(x)).flatten(2)))
        return self.head(x.mean(2))


def same_sign(module):
    """Weights of one sign and one size, all of whose codes would be 127."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 + 0.1 * torch.rand(parameter.shape))
    return module.eval()


def kernel_matrix(weight):
    """The matrix (K, N) of a convolution as onnxruntime multiplies it: positions outside, channels inside."""
    return np.moveaxis(weight, 1, -1).reshape(len(weight), -1).T


def test_convolutions_in_the_order_of_the_kernels(tmp_path):
    torchao = pytest.importorskip("torch_surgery_torchao")
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    base = surgery.capture(same_sign(Layers()), (torch.rand(2, 3, 9, 9),))
    base.apply(torchao.Int8Static(target="all", cpu="vnni")).export(tmp_path / "wide.onnx")
    base.apply(torchao.Int8Static(target="all")).export(tmp_path / "model.onnx")
    for name, expected in (("wide", True), ("model", False)):
        graph, seen = onnx.load(tmp_path / f"{name}.onnx").graph, []
        for tensor in graph.initializer:
            if tensor.name.endswith(".codes"):
                codes = onnx.numpy_helper.to_array(tensor)
                if "depthwise" in tensor.name:
                    assert np.abs(codes).max() == 127  # computed in 32 bits, so it keeps all 8 bits
                    continue
                assert saturates(kernel_matrix(codes) if codes.ndim > 2 else codes) is expected, tensor.name
                seen.append(tensor.name)
        assert len(seen) == 5


def sample(**options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.ReLU(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 8))
    base = surgery.capture(same_sign(module), (torch.randn(4, 256),))
    return base.apply(surgery.Quantize(**DYNAMIC, **options))


@pytest.mark.parametrize("per_token", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_file_is_right_where_products_saturate(per_token, tmp_path):
    off = {}
    for cpu in ("any", "vnni"):
        path = tmp_path / f"{cpu}.onnx"
        sample(per_token=per_token, cpu=cpu).export(path)
        proto = onnx.load(path)
        assert {e.key: e.value for e in proto.metadata_props}.get("surgery.cpu") == (
            None if cpu == "any" else "vnni"
        )
        weights = [
            onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith(".codes")
        ]
        x = np.random.default_rng(0).integers(128, 256, (16, 256)).astype(np.uint8)
        first = next(w for w in weights if w.shape[0] == 256)
        exact = x.astype(np.int64) @ first.astype(np.int64)
        off[cpu] = float(np.abs(saturating(x, first) - exact).max() / np.abs(exact).max())
    assert off["any"] == 0
    assert off["vnni"] > 0.2


def test_the_error_of_both_is_in_the_plan():
    for cpu, said in (("any", True), ("vnni", False)):
        (row, *_) = sample(cpu=cpu).reports[-1].plan.accepted
        note = surgery.Quantize(**DYNAMIC, cpu=cpu).outcome(row.site).note
        assert ("with --cpu vnni)" in note) is said
        assert ("error_of_8_bits" in row.site.decided) is said
        assert row.site.decided.get("error_of_8_bits", 0) < row.site.decided["error"]


def test_training_converts_to_the_same_codes():
    torch.manual_seed(0)
    base = surgery.capture(same_sign(nn.Sequential(nn.Linear(16, 4))), (torch.rand(2, 16),))
    program = base.apply(surgery.FakeQuant(**DYNAMIC)).apply(surgery.Convert())
    plain = base.apply(surgery.Quantize(**DYNAMIC))
    codes = [next(t for n, t in p.tensors.items() if n.endswith("codes")) for p in (program, plain)]
    assert torch.equal(*codes)
    assert not overflowing(codes[0]).any()
    assert torch.equal(base.apply(surgery.FakeQuant(**DYNAMIC)).run(), plain.run())


def test_refused_where_it_could_overflow(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    wide = sample(cpu="vnni")
    with pytest.raises(
        ExportError, match=r"overflow 16 bits .*: 1 \([\d,]+ of 4,096 pairs\), 3 \(.*--cpu any, or"
    ):
        wide.export(path, cpu="any")
    # The check reads the weights, so it does not depend on this machine; the products are tried at export.
    monkeypatch.setattr(saturation, "saturates_here", lambda: True)
    with pytest.raises(ExportError, match=r"saturate on this machine, .* quantize again with --cpu any"):
        wide.export(path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(PassError, match=r"--cpu is for int8-dynamic"):
        surgery.Quantize.parse({"target": "all", "format": "int8", "cpu": "vnni"})


def test_command_line(tmp_path, capsys):
    ref = "py:tests.passes.quantize.test_pairs:captured"
    apply = ["apply", ref, "--pass", "quantize", "--target", "all", "--format", "int8-dynamic"]
    out = str(tmp_path / "wide")
    for command, code in (
        ([*apply, "--cpu", "vnni", "-o", out], 0),
        (["export", out, "--base", ref, "--cpu", "any", "-o", f"{out}.onnx"], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == code, capsys.readouterr()
    assert "overflow 16 bits" in capsys.readouterr().err


def captured():
    torch.manual_seed(0)
    return same_sign(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))), (torch.rand(2, 16),)
