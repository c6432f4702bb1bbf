"""Recurrences of transformers' models, called through functions of their modules, as `linear_attention` ops.

transformers computes a recurrence in a function at the top level of a model's file, which a kernel of another library
may replace. Its loop over the sequence fixes the length in a capture. So these functions are replaced for a capture,
by ones with the same arguments, results and rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.capture.recurrences.loops import METHODS
from surgery.capture.recurrences.operators import linear_attention


def gated_delta_rule(module: ModuleType) -> Callable[..., Any]:
    """Gated delta rule: Qwen3-Next, Qwen3.5, Qwen4, OLMo hybrid; by key dimension: Kimi Linear, Bailing, GLM-5."""

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = query.dtype
        query, key = query.float(), key.float()
        if use_qk_l2norm_in_kernel:
            # The models differ in the rounding of this norm.
            query, key = module.l2norm(query, dim=-1, eps=1e-6), module.l2norm(key, dim=-1, eps=1e-6)
        query = query * key.shape[-1] ** -0.5
        out, last = linear_attention(
            query, key, value.float(), g.float(), beta.float(), initial_state, "gated_delta", 1.0
        )
        return out.to(dtype), last if output_final_state else None

    return function


def mamba2(module: ModuleType) -> Callable[..., Any]:
    """State-space scan of Mamba 2: Bamba, Falcon-H1, Granite hybrid, Nemotron-H, Zamba 2."""

    def function(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        if dt_softplus:
            dt = F.softplus(dt)
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
        x = hidden_states.float()
        start = None if initial_states is None else initial_states.float().transpose(-1, -2)
        out, last = linear_attention(
            C.float(), B.float(), x * dt[..., None], A.float() * dt, None, start, "gated", 1.0
        )
        if D is not None:
            out = out + D[..., None] * x
        return (out, last.transpose(-1, -2)) if return_final_states else out

    return function


def mamba1(module: ModuleType) -> Callable[..., Any]:
    """Selective scan of Mamba: Mamba, Falcon-Mamba, Jamba. Each channel is a head with a value of width 1."""

    def function(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> Any:
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        if delta_softplus:
            dt = F.softplus(dt)
        dtype, times = hidden_states.dtype, dt.transpose(1, 2).float()
        values = (times * hidden_states.transpose(1, 2).float()).unsqueeze(-1)
        read, written = (x.transpose(1, 2).float().unsqueeze(2) for x in (C, B))
        out, last = linear_attention(read, written, values, times.unsqueeze(-1) * A, None, None, "gated", 1.0)
        out = out.squeeze(-1).transpose(1, 2).to(dtype)
        if D is not None:
            out = out + hidden_states * D[None, :, None]
        if z is not None:
            out = out * F.silu(z)
        return (out, last.squeeze(-1).to(dtype)) if return_last_state else out

    return function


# Names of transformers' functions.
_FUNCTIONS: dict[str, Callable[[ModuleType], Callable[..., Any]]] = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": mamba2,
    "mamba_selective_scan": mamba1,
}


@contextlib.contextmanager
def replaced(model: nn.Module) -> Iterator[None]:
    """Replace functions and methods with a recurrence inside the block: in the files and classes of the model."""
    kinds = {kind for child in model.modules() for kind in type(child).__mro__}
    kinds = {kind for kind in kinds if kind.__module__.startswith("transformers.")}
    with contextlib.ExitStack() as stack:
        for file in sorted({kind.__module__ for kind in kinds}):
            module = sys.modules[file]
            for name, make in _FUNCTIONS.items():
                if hasattr(module, name):
                    stack.enter_context(_set(module, name, make(module)))
        for kind in kinds:
            for name, method in METHODS.get(kind.__name__, {}).items():
                stack.enter_context(_set(kind, name, method))
        yield


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
