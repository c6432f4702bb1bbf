"""Is a capture what eager is? Run both, at the example's sizes and at others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from surgery.capture.shapes import Axis, fresh_inputs, input_names
from surgery.capture.types import Captured
from surgery.common.errors import CaptureError

# Graph and eager run the same ATen ops on the same kernels in the same order: the example agrees to the bit
# in nearly every model. What differs is which form of a mask or an attention kernel is chosen (an all-ones
# mask is dropped in eager and kept in the graph), a few reassociated sums: 64 and 1024 units in the last place
# of the largest output. A baked-in size or mask is wrong in the first digit.
_EXAMPLE_ULPS = 64
_OTHER_ULPS = 1024


def in_memory(module: nn.Module) -> bool:
    """Whether every weight has real storage (not fake, not on the meta device)."""
    tensors = [*module.parameters(), *module.buffers()]
    return not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)


def refuse_static(captured: Captured, axes: list[Axis]) -> None:
    """Raise CaptureError where an axis that was to be dynamic is a number in the graph."""

    names = input_names(captured)
    values = [*captured.args, *captured.kwargs.values()]
    placeholders = iter(node for node in captured.graph.nodes if node.op == "placeholder")
    by_name = {}
    for name, value in zip(names, values, strict=True):
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            node = next(placeholders, None)
            keys = [str(getattr(key, "idx", getattr(key, "key", key))) for key in path]
            if node is not None and isinstance(leaf, torch.Tensor):
                by_name[".".join([name, *keys])] = node
    for axis in axes:
        node = by_name.get(axis.input)
        fake = node.meta.get("val") if node is not None else None
        if isinstance(fake, torch.Tensor) and isinstance(fake.shape[axis.axis], int):
            raise CaptureError(
                f"dimension '{axis.name}' (axis {axis.axis} of input '{axis.input}') became the constant "
                f"{fake.shape[axis.axis]} in the capture; leave it out of the dynamic dimensions"
            )


def compare(module: nn.Module, captured: Captured, sizes: Mapping[str, int] | None = None) -> None:
    """Run eager and capture on the example inputs, or on fresh ones at `sizes`.

    `module` must already return what the capture returns. Raises CaptureError naming the first output that
    differs.
    """
    if sizes is None:
        args, kwargs, ulps, at = captured.args, dict(captured.kwargs), _EXAMPLE_ULPS, "the example inputs"
    else:
        args, kwargs = fresh_inputs(captured, sizes, seed=1)
        ulps = _OTHER_ULPS
        at = ", ".join(f"{name}={size}" for name, size in sizes.items())
    with torch.no_grad():
        with _same_state(module):
            try:
                expected = module(*args, **kwargs)
            except Exception as error:
                raise CaptureError(
                    f"eager itself fails at {at}: {_first_line(error)}; narrow the range"
                ) from error
        with _same_state(module):
            try:
                got = captured.graph_module(*args, **kwargs)
            except Exception as error:
                raise CaptureError(
                    f"the capture fails at {at}, where eager runs: {_first_line(error)}; a size is baked into "
                    "the model's code: leave that dimension static"
                ) from error
    problem = difference(expected, got, ulps)
    if problem is not None:
        raise CaptureError(f"the capture disagrees with eager at {at}: {problem}")


def difference(expected: object, got: object, ulps: int) -> str | None:
    """The first difference between two outputs, as a clause; None where there is none.

    Floats may differ by `ulps` units in the last place of the largest expected value; all else must be equal.
    """
    wanted, wanted_spec = pytree.tree_flatten_with_path(expected)
    found, found_spec = pytree.tree_flatten_with_path(got)
    if wanted_spec != found_spec:
        return "the structure of the output differs"
    for (path, a), (_, b) in zip(wanted, found, strict=True):
        name = pytree.keystr(path) or "the output"
        if not isinstance(a, torch.Tensor):
            if a != b:
                return f"{name} is {b}, not {a}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} is {b.dtype} of shape {tuple(b.shape)}, not {a.dtype} of shape {tuple(a.shape)}"
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return f"{name} differs in {int((a != b).sum())} of {a.numel()} values"
            continue
        finite = a[torch.isfinite(a)].double().abs()
        largest = max(1.0, float(finite.max())) if finite.numel() else 1.0
        tolerance = ulps * torch.finfo(a.dtype).eps * largest
        if not torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance, equal_nan=True):
            worst = (a.double() - b.double()).nan_to_num().abs().max()
            return f"{name} differs by {float(worst):.3g} (allowed {tolerance:.3g})"
    return None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _same_state(module: nn.Module) -> Iterator[None]:
    """The same random numbers and the same buffers for both runs; both are restored."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
