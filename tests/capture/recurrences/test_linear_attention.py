"""The op `surgery::linear_attention` against the recurrence step by step: all rules, lengths and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from surgery.capture.recurrences.operators import linear_attention
from surgery.capture.recurrences.scan import RULES

# Lengths below, at and above the chunks of 16, 32 and 64 steps.
LENGTHS = (1, 5, 16, 33, 64, 130)
# (key heads, heads, dk, dv). The last is Mamba 1: a head for each channel.
SHAPES = ((2, 4, 7, 5), (3, 3, 4, 4), (1, 6, 5, 1))


def step_by_step(q, k, v, decay, beta, state, rule, scale):
    heads, groups = v.shape[2], k.shape[2]
    q, k = (x.repeat_interleave(heads // groups, 2) for x in (q, k))
    if state is None:
        state = torch.zeros(v.shape[0], heads, k.shape[3], v.shape[3], dtype=q.dtype)
    outs = []
    for t in range(v.shape[1]):
        if decay is not None:
            rate = decay[:, t].exp()
            state = state * (rate[..., None, None] if rate.dim() == 2 else rate[..., None])
        value = v[:, t]
        if beta is not None:
            value = (value - (state * k[:, t][..., None]).sum(-2)) * beta[:, t][..., None]
        state = state + k[:, t][..., None] * value[..., None, :]
        outs.append((state * q[:, t][..., None]).sum(-2) * scale)
    return torch.stack(outs, 1), state


def operands(rule: str, steps: int, shape, by_key: bool, dtype=torch.float64, seed: int = 0):
    groups, heads, size, width = shape
    made = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=made, dtype=dtype)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=made, dtype=dtype)

    return [
        normal(2, steps, groups, size),
        # Keys of length 1, as the delta rule needs them to be stable.
        torch.nn.functional.normalize(normal(2, steps, groups, size), dim=-1),
        normal(2, steps, heads, width),
        -3 * uniform(2, steps, heads, *([size] if by_key else [])) if "gated" in rule else None,
        uniform(2, steps, heads) if "delta" in rule else None,
        normal(2, heads, size, width),
    ]


@pytest.mark.parametrize("by_key", [False, True], ids=["by head", "by key"])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_recurrence_with_gradients(rule: str, by_key: bool) -> None:
    if by_key and "gated" not in rule:
        pytest.skip("the rule has no decay")
    for shape in SHAPES:
        for steps in LENGTHS:
            given = operands(rule, steps, shape, by_key)
            given = [None if x is None else x.requires_grad_() for x in given]
            found, wanted = linear_attention(*given, rule, 0.3), step_by_step(*given, rule, 0.3)
            weights = [torch.randn_like(x) for x in wanted]
            leaves = [x for x in given if x is not None]
            grads = [torch.autograd.grad(made, leaves, weights) for made in (found, wanted)]
            for a, b in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
                # float64 over at most 130 steps: sums in another order.
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_no_state_is_a_state_of_zeros(rule: str) -> None:
    given = operands(rule, 21, SHAPES[0], False)
    given[5] = torch.zeros_like(given[5])
    for a, b in zip(linear_attention(*given, rule), linear_attention(*given[:5], None, rule), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_in_two_parts(rule: str) -> None:
    given = operands(rule, 75, SHAPES[0], False)
    whole, last = linear_attention(*given, rule)
    first = [None if x is None else x[:, :30] for x in given[:5]]
    rest = [None if x is None else x[:, 30:] for x in given[:5]]
    begun, state = linear_attention(*first, given[5], rule)
    ended, final = linear_attention(*rest, state, rule)
    torch.testing.assert_close(torch.cat([begun, ended], 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(final, last, rtol=1e-9, atol=1e-9)


def test_strong_decays_stay_finite() -> None:
    """A cumulative decay of -10,000 in one chunk: its exponential is 0, and that of its negative is infinite."""
    for by_key in (False, True):
        for rule in ("gated", "gated_delta"):
            given = operands(rule, 130, SHAPES[0], by_key, torch.float32)
            given[3] = (given[3] * 60).requires_grad_()
            out, last = linear_attention(*given, rule)
            wanted, _ = step_by_step(*given, rule, 1.0)
            # float32: 1e-5 of values of about 3.
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=3e-5)
            (grad,) = torch.autograd.grad(out.sum() + last.sum(), given[3])
            assert bool(torch.isfinite(grad).all())


def test_half_precision_computes_in_float32() -> None:
    given = operands("gated_delta", 70, SHAPES[0], False, torch.float32)
    low = [x.bfloat16() for x in given]
    out, last = linear_attention(*low, "gated_delta")
    wide, wide_last = linear_attention(*(x.float() for x in low), "gated_delta")
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert torch.equal(out, wide.bfloat16())
    assert torch.equal(last, wide_last)


def test_second_gradient() -> None:
    given = [
        x.requires_grad_() if x is not None else None for x in operands("gated_delta", 20, SHAPES[0], False)
    ]

    def second(made):
        (first,) = torch.autograd.grad(made[0].square().sum(), given[1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), given[3])[0]

    torch.testing.assert_close(
        second(linear_attention(*given, "gated_delta")),
        second(step_by_step(*given, "gated_delta", 1.0)),
        rtol=1e-8,
        atol=1e-8,
    )


def test_shapes_of_fakes() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 9, 2, 4, dtype=torch.bfloat16)
        v = torch.empty(2, 9, 6, 3, dtype=torch.bfloat16)
        out, last = linear_attention(q, q, v, None, None, None, "linear")
        assert out.shape == (2, 9, 6, 3)
        assert out.dtype == torch.bfloat16
        assert last.shape == (2, 6, 4, 3)
        assert last.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({6: "softmax"}, "no rule 'softmax'"),
        ({3: None}, "'gated_delta' needs decay"),
        ({6: "linear"}, "'linear' has no decay"),
        ({2: torch.ones(2, 8, 3, 5)}, "do not fit"),
        ({3: torch.zeros(2, 8, 3)}, "decay"),
        ({4: torch.ones(2, 8, 2)}, "beta"),
        ({5: torch.ones(2, 4, 5, 5)}, "state"),
    ],
)
def test_wrong_operands_are_named(change, said) -> None:
    given = [*operands("gated_delta", 8, SHAPES[0], False), "gated_delta"]
    for place, value in change.items():
        given[place] = value
    with pytest.raises(ValueError, match=said):
        linear_attention(*given)
