"""Third-party ops with packed weights, as a plugin adds them: pairs of 4-bit codes and a codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.api import CONV, EMBEDDING, LINEAR, WeightOp, hookimpl
from surgery.api.programs import make_plugin_manager
from surgery.passes.sparse.sparse_tune import SparseTune

CODEBOOK = torch.tensor(
    [-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1]
)


def unpack(t) -> Tensor:
    """Codes (out, in / 2) of the library, two in a byte; scales (out, in / block)."""
    numbers = torch.stack([t["packed"] // 16, t["packed"] % 16], -1).flatten(1)
    blocks = CODEBOOK.to(t["packed"].device)[numbers.long()].unflatten(1, (-1, t["block"]))
    return (blocks * t["scales"].unsqueeze(-1)).flatten(1)


def unpack_int8(t) -> Tensor:
    return t["packed"] * t["scales"].reshape(-1, *(1 for _ in t["packed"].shape[1:]))


@torch.library.custom_op("surgery_packed::linear4", mutates_args=())
def linear4(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, block: int) -> Tensor:
    weight = unpack({"packed": packed, "scales": scales, "block": block}).to(x.dtype)
    return nn.functional.linear(x, weight, bias)


@linear4.register_fake
def _(x, packed, scales, bias, block):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _keep(ctx, inputs, output):
    _, packed, scales, bias, ctx.block = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(packed, scales)


def _backward(ctx, grad):
    packed, scales = ctx.saved_tensors
    weight = unpack({"packed": packed, "scales": scales, "block": ctx.block}).to(grad.dtype)
    return grad @ weight, None, None, grad.flatten(0, -2).sum(0) if ctx.biased else None, None


linear4.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("surgery_packed::linear8_dynamic", mutates_args=())
def linear8_dynamic(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """Linear op that also rounds its activation to 8 bits, so it is not linear in x."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return ((x / step).round() * step) @ unpack_int8({"packed": packed, "scales": scales}).t() + bias


@linear8_dynamic.register_fake
def _(x, packed, scales, bias):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


linear8_dynamic.register_autograd(
    lambda ctx, grad: (
        grad @ unpack_int8(dict(zip(("packed", "scales"), ctx.saved_tensors, strict=True))),
        *[None] * 3,
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:3]),
)


@torch.library.custom_op("surgery_packed::embedding8", mutates_args=())
def embedding8(packed: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    return packed[indices] * scales[indices].unsqueeze(-1)


@embedding8.register_fake
def _(packed, scales, indices):
    return scales.new_empty((*indices.shape, packed.shape[1]))


@torch.library.custom_op("surgery_packed::conv8", mutates_args=())
def conv8(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor, stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    weight = unpack_int8({"packed": packed, "scales": scales})
    return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


@conv8.register_fake
def _(x, packed, scales, bias, stride, padding, dilation, groups):
    weight = x.new_empty(packed.shape)
    return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


@torch.library.custom_op("surgery_packed::opaque", mutates_args=())
def opaque(x: Tensor, packed: Tensor) -> Tensor:
    return x @ packed.to(x.dtype).t()


@opaque.register_fake
def _(x, packed):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


OPS = torch.ops.surgery_packed


def _by_values(t) -> Tensor:
    return t["packed"].float() if t["packed"].max() > 0 else t["packed"].double()


class Packed:
    """The plugin."""

    @hookimpl
    def surgery_weight_ops(self):
        both = ("packed", "scales")
        return {
            OPS.linear4.default: WeightOp(LINEAR, "x", both, dequantize=unpack),
            OPS.linear8_dynamic.default: WeightOp(LINEAR, "x", both, dequantize=unpack_int8),
            OPS.embedding8.default: WeightOp(EMBEDDING, "indices", both, None, "vd", dequantize=unpack_int8),
            OPS.conv8.default: WeightOp(CONV, "x", both, dequantize=unpack_int8),
            OPS.opaque.default: WeightOp(LINEAR, "x", ("packed",), None, dequantize=_by_values),
        }

    @hookimpl
    def surgery_onnx_lowerings(self):
        from onnxscript import opset18 as op

        def linear8(x, packed, scales, bias):
            weight = op.Mul(op.Cast(packed, to=1), op.Unsqueeze(scales, [1]))
            largest = op.Max(op.ReduceMax(op.Abs(x), [-1], keepdims=1), op.Constant(value_float=1e-8))
            step = op.Div(largest, op.Constant(value_float=127.0))
            rounded = op.Mul(op.Round(op.Div(x, step)), step)
            return op.Add(op.MatMul(rounded, op.Transpose(weight, perm=[1, 0])), bias)

        def lowered4(x, packed, scales, bias, block):
            codes = op.Unsqueeze(op.Cast(packed, to=7), [-1])
            sixteen = op.Constant(value_int=16)
            numbers = op.Concat(op.Div(codes, sixteen), op.Mod(codes, sixteen), axis=-1)
            values = op.Gather(op.Constant(value_floats=CODEBOOK.tolist()), numbers)
            # (out, in / block, block) times (out, in / block, 1)
            blocks = op.Reshape(values, op.Constant(value_ints=[0, -1, block]), allowzero=0)
            weight = op.Flatten(op.Mul(blocks, op.Unsqueeze(scales, [-1])), axis=1)
            product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
            return product if bias is None else op.Add(product, bias)

        return {OPS.linear8_dynamic.default: linear8, OPS.linear4.default: lowered4}


class _Held(nn.Module):
    def __init__(self, packed: Tensor, scales: Tensor, bias: int | None = None) -> None:
        super().__init__()
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))


class Linear4(_Held):
    def __init__(self, inputs: int, outputs: int, block: int = 4, bias: bool = True) -> None:
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        super().__init__(codes, torch.rand(outputs, inputs // block) / 2 + 0.1, outputs if bias else None)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return linear4(x, self.packed, self.scales, self.bias, self.block)

    def weight(self) -> Tensor:
        return unpack({"packed": self.packed, "scales": self.scales, "block": self.block})


def _int8(*size: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, size, dtype=torch.int8), torch.rand(size[0]) / 200 + 1e-3


class Linear8Dynamic(_Held):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(*_int8(outputs, inputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return linear8_dynamic(x, self.packed, self.scales, self.bias)

    def weight(self) -> Tensor:
        return unpack_int8({"packed": self.packed, "scales": self.scales})


class _Int8(_Held):
    def weight(self) -> Tensor:
        return unpack_int8({"packed": self.packed, "scales": self.scales})


class Embedding8(_Int8):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__(*_int8(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return embedding8(self.packed, self.scales, ids)


class Conv8(_Int8):
    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__(*_int8(outputs, inputs // groups, 3, 3), outputs)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return conv8(x, self.packed, self.scales, self.bias, [2, 2], [1, 1], [1, 1], self.groups)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return opaque(x, self.packed)


# -- passes on them

WITHIN = 1e-5
SCALE = 16.0 / 3  # alpha / rank


def capture(module, *inputs):
    plugins = make_plugin_manager(plugins=(Packed(),))
    return surgery.capture(module.eval(), inputs or (torch.randn(3, 5, 6),), plugins=plugins)


def trained(program, seed=1):
    """Change parameters at random, as an optimizer would; frozen tensors stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if isinstance(tensor, nn.Parameter):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return program


def sparse(**options):
    return SparseTune(target="own,dynamic", density=0.2, **options)


PASSES = {
    "dora": surgery.Lora(target="own,dynamic", rank=3, dora=True),
    "dora-full": surgery.Lora(target="own,dynamic", rank=3, dora=True, full_gradient=True),
    "pissa": surgery.Lora(target="own,dynamic", rank=3, init="pissa"),
    "magnitude": sparse(),
    "random": sparse(by="random"),
    "gradient": sparse(by="gradient"),
}


def formula(pass_, module, x, read, own, start):
    """The ordinary formula on float weights. read: x as the op reads it; own: tensors of the pass, leaves."""
    weight, bias = module.weight(), module.bias
    if isinstance(pass_, SparseTune):
        dense = torch.zeros(weight.numel()).index_put((start["indices"],), own["values"]).view_as(weight)
        return F.linear(read, weight, bias) + F.linear(x, dense)
    update = SCALE * own["B"] @ own["A"]
    if not pass_.dora:
        return F.linear(read, weight, bias) + F.linear(x, update - SCALE * start["B0"] @ start["A0"])
    norm = (weight + update).norm(dim=1)
    factor = own["m"] / (norm if pass_.full_gradient else norm.detach())
    return F.linear(read, factor[:, None] * weight) + F.linear(x, factor[:, None] * update) + bias


def tensors_at(program, layer):
    return {n.rpartition(".")[2]: t for n, t in program.tensors.items() if n.startswith(layer)}
