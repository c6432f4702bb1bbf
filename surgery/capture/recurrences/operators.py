"""Recurrences as ops of a graph, so that a captured graph holds one node for each and any length can be run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from surgery.capture.recurrences.scan import RULES, scan


@torch.library.custom_op("surgery::linear_attention", mutates_args=())
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    rule: str,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Linear attention: a recurrence over time whose state is a (dk, dv) matrix S for each head.

    Every rule reads the state by `out = scale · Sᵀ q`, after it has updated it:

        linear:       S = S + k vᵀ
        gated:        S = exp(decay) S + k vᵀ
        delta:        S = S + beta k (v - Sᵀ k)ᵀ
        gated_delta:  S = exp(decay) S + beta k (v - (exp(decay) S)ᵀ k)ᵀ

    The semantics are those of ONNX's LinearAttention (opset 27), but with groups as Mamba 2 and Qwen3-Next have them:
    heads of q and k serve several consecutive heads of v. It computes in float32 at least.

    Args:
        q: Queries (batch, time, key heads, dk).
        k: Keys (batch, time, key heads, dk).
        v: Values (batch, time, heads, dv); heads is a multiple of the key heads.
        decay: Logarithms of the decay, at most 0: (batch, time, heads), or (batch, time, heads, dk) for one of each
            key dimension. None for the rules "linear" and "delta".
        beta: Update rates (batch, time, heads); None for the rules "linear" and "gated".
        state: State before the first step (batch, heads, dk, dv); None for zeros.
        rule: "linear", "gated", "delta" or "gated_delta".
        scale: Factor of the output.

    Returns:
        The output (batch, time, heads, dv) in the dtype of q, and the state after the last step (batch, heads, dk,
        dv), in float32 (float64 if q is).

    Raises:
        ValueError: The rule is unknown, an operand that it needs is missing, or shapes do not fit.
    """
    _check(q, k, v, decay, beta, state, rule)
    with torch.no_grad():
        out, last = scan(q, k, v, decay, beta, state, rule, scale)
    return out.contiguous(), last.contiguous()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    rule: str,
) -> None:
    if rule not in RULES:
        raise ValueError(f"linear_attention has no rule {rule!r}; use one of {', '.join(RULES)}")
    for name, given, needed in (("decay", decay, "gated" in rule), ("beta", beta, "delta" in rule)):
        if (given is not None) != needed:
            raise ValueError(f"linear_attention: rule {rule!r} {'needs' if needed else 'has no'} {name}")
    heads, groups = v.shape[2], k.shape[2]
    if q.shape != k.shape or q.shape[:2] != v.shape[:2] or groups == 0 or heads % groups:
        raise ValueError(
            f"linear_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; q and k "
            "have one shape, and the heads of v are a multiple of theirs"
        )
    rows = (*v.shape[:3],)
    if decay is not None and decay.shape not in (rows, (*rows, k.shape[3])):
        raise ValueError(
            f"linear_attention: decay {tuple(decay.shape)} is neither {rows} nor with dk behind it"
        )
    if beta is not None and beta.shape != rows:
        raise ValueError(f"linear_attention: beta {tuple(beta.shape)} is not {rows}")
    whole = (v.shape[0], heads, k.shape[3], v.shape[3])
    if state is not None and state.shape != whole:
        raise ValueError(f"linear_attention: state {tuple(state.shape)} is not {whole}")


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@linear_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    last = q.new_empty((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=_wide(q))
    return q.new_empty(v.shape), last


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record inside the kernel of an op, where torch has switched it off."""
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


@torch.library.custom_op("surgery::linear_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    rule: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors; empty for one that is None. The forward runs again, so it need keep nothing."""
    given: list[Any] = [
        None if x is None else x.detach().requires_grad_() for x in (q, k, v, decay, beta, state)
    ]
    with _recording():
        out, last = scan(given[0], given[1], given[2], given[3], given[4], given[5], rule, scale)
    found = iter(
        torch.autograd.grad((out, last), [x for x in given if x is not None], (grad_out, grad_state))
    )
    return tuple(q.new_empty(0) if x is None else next(found).contiguous() for x in given)  # type: ignore[return-value]


@_backward_op.register_fake
def _(grad_out: Tensor, grad_state: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    given = operands[:6]
    return tuple(grad_out.new_empty(0) if x is None else torch.empty_like(x) for x in given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, rule, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.rule, ctx.scale = rule, scale


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        # A gradient of the gradient is asked for (create_graph), so autograd has to see the ops.
        q, k, v, decay, beta, state = tensors
        out, last = scan(q, k, v, decay, beta, state, ctx.rule, ctx.scale)
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad((out, last), wanted, (grad_out, grad_state), create_graph=True))
        grads = [next(found) if x is not None and x.requires_grad else None for x in tensors]
    else:
        made = torch.ops.surgery.linear_attention_backward(
            grad_out, grad_state, *tensors, ctx.rule, ctx.scale
        )
        grads = [None if x is None else grad for x, grad in zip(tensors, made, strict=True)]
    return (*grads, None, None)


linear_attention.register_autograd(_backward, setup_context=_keep)
