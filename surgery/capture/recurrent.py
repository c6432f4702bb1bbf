"""Shape rules of recurrent ops (LSTM, GRU, RNN), so that the number of time steps can be dynamic.

torch runs these ops on fake tensors by their decomposition, a Python loop over the time steps, which fixes their
number. The graph keeps the op either way; only the shapes of its outputs are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_impls

aten = torch.ops.aten
# torch registers its decomposition for both.
_KEYS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)


def _lstm(x: Tensor, hx: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, cell = hx
    return _sequence(x, hidden, options), torch.empty_like(hidden), torch.empty_like(cell)


def _others(x: Tensor, hidden: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _sequence(x, hidden, options), torch.empty_like(hidden)


def _sequence(x: Tensor, hidden: Tensor, options: Sequence[Any]) -> Tensor:
    """The output sequence; its first two axes are those of the input, in either order of batch and time."""
    # The options after x and the state are params, has_biases, num_layers, dropout, train, bidirectional, batch_first.
    return x.new_empty((*x.shape[:2], hidden.shape[-1] * (2 if options[5] else 1)))


_RULES: dict[Any, Callable[..., Any]] = {
    aten.lstm.input: _lstm,
    aten.gru.input: _others,
    aten.rnn_tanh.input: _others,
    aten.rnn_relu.input: _others,
}


@contextlib.contextmanager
def shape_rules() -> Iterator[None]:
    """Use these rules for fake tensors inside the block. Real tensors run the ops as always."""
    # Fake tensors look an op up in these tables: torch.export's preserved ops in the first, others in the second, and a
    # trace that decomposes in the kernels.
    tables = fake_impls.op_implementations_dict, torch._decomp.decomposition_table
    before = [(table, op, table.get(op)) for table in tables for op in _RULES]
    before += [(op.py_kernels, key, op.py_kernels.get(key)) for op in _RULES for key in _KEYS]
    try:
        for op, rule in _RULES.items():
            fake_impls.op_implementations_dict[op] = _in_mode(rule)
            torch._decomp.decomposition_table[op] = rule
            for key in _KEYS:
                op.py_kernels[key] = _on_fakes(rule, op.py_kernels.get(key))
            op._dispatch_cache.clear()
        yield
    finally:
        for table, key, value in before:
            _put_back(table, key, value)
        for op in _RULES:
            op._dispatch_cache.clear()


def _put_back(table: dict[Any, Any], key: Any, value: Any) -> None:
    """Restore an entry of a table; None removes it."""
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def _in_mode(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule as an entry of torch's table of fake implementations."""

    def implementation(mode: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return rule(*args, **kwargs)

    return implementation


def _on_fakes(rule: Callable[..., Any], otherwise: Callable[..., Any] | None) -> Callable[..., Any]:
    """The rule on fake tensors, and the kernel that was registered before on others."""

    def kernel(x: Tensor, *rest: Any) -> Any:
        # Fake tensors may be wrapped, for example by functionalization.
        if otherwise is None or type(x) not in (Tensor, torch.nn.Parameter):
            return rule(x, *rest)
        return otherwise(x, *rest)

    return kernel
