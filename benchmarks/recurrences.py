"""The op of linear recurrences against transformers' torch functions, and in onnxruntime against an unrolled loop.

In torch: forward, and forward and backward, at 128, 2,048 and 8,192 tokens, batch 1, on shapes of small models. Mamba's
own function loops over the tokens, and its backward at 8,192 tokens takes minutes, so it is left out.

In onnxruntime: a step of one token with a state, and 32 tokens, of the gated delta rule. The peer is the loop of
transformers as torch.onnx unrolls it at that length.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import surgery
from benchmarks.timing import Row, Variant, compare, measure
from surgery.capture.recurrences.kernels import gated_delta_rule, mamba1, mamba2
from surgery.capture.recurrences.operators import linear_attention

AIM = 1.0
_LENGTHS = (128, 2048, 8192)
_LONG = 8192


def run(quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    for what, make, theirs, ours in _cases():
        for steps in _LENGTHS[: 1 if quick else None]:
            args, kwargs = make(steps)
            for backward in (False, True):
                if backward and steps == _LONG and what == "Mamba":
                    continue
                given = [
                    x.clone().requires_grad_() if backward and isinstance(x, Tensor) else x for x in args
                ]
                variants = {
                    "op": Variant(_call(ours, given, kwargs, backward)),
                    "transformers": Variant(_call(theirs, given, kwargs, backward)),
                }
                times = measure(variants, rounds=5 if steps == 128 else 3 if steps < _LONG else 1)
                name = f"{what}, {steps:,} tokens, {'forward and backward' if backward else 'forward'}"
                yield compare("recurrences", name, times, "op", "transformers", AIM)
    for steps in (1, 32):
        yield _in_onnxruntime(steps)


def _cases() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any]]]:
    def files(name: str) -> Any:
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    qwen, kimi, second, first = (files(n) for n in ("qwen3_next", "kimi_linear", "mamba2", "mamba"))
    yield "Gated delta rule", _delta, qwen.torch_chunk_gated_delta_rule, gated_delta_rule(qwen)
    yield "The same by key", _delta_by_key, kimi.chunk_kimi_delta_attention, gated_delta_rule(kimi)
    yield "Mamba 2", _mamba2, second.mamba2_chunk_scan, mamba2(second)
    yield "Mamba", _mamba1, first.mamba_selective_scan, mamba1(first)


def _delta(steps: int) -> tuple[list[Any], dict[str, Any]]:
    q, k, v = torch.randn(1, steps, 4, 64), torch.randn(1, steps, 4, 64), torch.randn(1, steps, 8, 64)
    return [q, k, v, -torch.rand(1, steps, 8), torch.rand(1, steps, 8)], {"use_qk_l2norm_in_kernel": True}


def _delta_by_key(steps: int) -> tuple[list[Any], dict[str, Any]]:
    q, k, v = (torch.randn(1, steps, 4, 64) for _ in range(3))
    return [q, k, v, -torch.rand(1, steps, 4, 64), torch.rand(1, steps, 4)], {"use_qk_l2norm_in_kernel": True}


def _mamba2(steps: int) -> tuple[list[Any], dict[str, Any]]:
    keys = [torch.randn(1, steps, 1, 128) for _ in range(2)]
    args = [torch.randn(1, steps, 16, 64), torch.randn(1, steps, 16), -torch.rand(16), *keys]
    return args, {"chunk_size": 256, "D": torch.ones(16), "dt_bias": torch.zeros(16), "dt_softplus": True}


def _mamba1(steps: int) -> tuple[list[Any], dict[str, Any]]:
    args = [torch.randn(1, 256, steps), torch.rand(1, 256, steps), -torch.rand(256, 16)]
    return [*args, *(torch.randn(1, 16, steps) for _ in range(2))], {"D": torch.ones(256)}


def _call(
    function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], backward: bool
) -> Callable[[Any], None]:
    def call(_: Any) -> None:
        with torch.set_grad_enabled(backward):
            out = function(*args, **kwargs)
        if backward:
            torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), args)

    return call


class _Op(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Any:
        return linear_attention(q, k, v, decay, beta, state, "gated_delta", q.shape[-1] ** -0.5)


class _Loop(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Any:
        qwen = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
        return qwen.torch_recurrent_gated_delta_rule(q, k, v, decay, beta, state, True)


def _in_onnxruntime(steps: int) -> Row:
    """A row for the gated delta rule with 16 heads of 64."""
    q, k, v = (torch.randn(1, steps, 16, 64) for _ in range(3))
    k = nn.functional.normalize(k, dim=-1)
    given = (q, k, v, -torch.rand(1, steps, 16), torch.rand(1, steps, 16), torch.randn(1, 16, 64, 64))
    with tempfile.TemporaryDirectory() as folder:
        op, loop = Path(folder) / "op.onnx", Path(folder) / "loop.onnx"
        surgery.capture(_Op(), given, {}).export(op)
        torch.onnx.export(_Loop(), given, str(loop), dynamo=True, verbose=False)
        sessions = {}
        for path in (op, loop):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            sessions[path.stem] = onnxruntime.InferenceSession(str(path), options)
    variants, outs = {}, {}
    for name, session in sessions.items():
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
        outs[name] = session.run(None, feeds)
        variants[name] = Variant(lambda _, s=session, f=feeds: [s.run(None, f) for _ in range(50)])
    for a, b in zip(outs["op"], outs["loop"], strict=True):
        # float32: the same recurrence, step by step.
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-4, atol=1e-5)
    times = measure(variants, rounds=9)
    what = f"onnxruntime, {steps} token{'s' if steps > 1 else ''} with a state"
    return compare(
        "recurrences", what, times, "op", "loop", AIM, "50 runs; the loop as torch.onnx unrolls it"
    )
