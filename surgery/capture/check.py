"""Comparison of a captured graph with the eager module, at the example sizes and at other sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from surgery.capture.fresh import fresh_inputs
from surgery.capture.shapes import Axis, input_names
from surgery.capture.types import Captured
from surgery.common.errors import CaptureError

# Tolerances in units in the last place (ULP) of the largest output value. The graph and the eager module run the
# same ATen ops on the same kernels in the same order, so nearly every model agrees bit for bit on the example.
# Small differences come from another attention kernel or mask form (eager drops an all-ones mask, the graph keeps
# it), which reorders a few sums. A baked-in size or mask produces an error in the first digit.
_EXAMPLE_ULPS = 64
_OTHER_ULPS = 1024


def in_memory(module: nn.Module) -> bool:
    """True if every parameter and buffer has real storage (is neither fake nor on the meta device)."""
    tensors = [*module.parameters(), *module.buffers()]
    return not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)


def refuse_static(captured: Captured, axes: list[Axis]) -> None:
    """Check that every requested dynamic axis is symbolic in the graph.

    Raises:
        CaptureError: an axis became a constant during the export.
    """
    names = input_names(captured)
    values = [*captured.args, *captured.kwargs.values()]
    placeholders = iter(node for node in captured.graph.nodes if node.op == "placeholder")
    # One placeholder exists for each pytree leaf, in pytree order. The leaves have to be walked along with the
    # placeholders, because placeholder names of nested inputs differ from the names that `Axis.input` uses.
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
    """Compare the outputs of the eager module and of the captured graph.

    Args:
        module: the eager module; its outputs must have the structure of the captured graph's outputs.
        captured: the captured graph.
        sizes: sizes of the named dimensions for fresh random inputs; None runs the example inputs.

    Raises:
        CaptureError: one of the two fails to run, or an output differs; the message names the first such output.
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
                    f"the eager module fails at {at}: {_first_line(error)}; narrow the range of the dimension"
                ) from error
        with _same_state(module):
            try:
                got = captured.graph_module(*args, **kwargs)
            except Exception as error:
                raise CaptureError(
                    f"the capture fails at {at}, but the eager module runs: {_first_line(error)}; the model's "
                    "code fixes a size, so make that dimension static"
                ) from error
    problem = difference(expected, got, ulps)
    if problem is not None:
        raise CaptureError(f"the capture disagrees with eager at {at}: {problem}")


def difference(expected: object, got: object, ulps: int) -> str | None:
    """Describe the first difference between two outputs.

    Args:
        expected: the outputs of the eager module (any pytree).
        got: the outputs to check.
        ulps: allowed difference of floats, in units in the last place of the largest expected value. All other
            values must be equal.

    Returns:
        A clause for an error message, or None if the outputs agree.
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
        # Infinite entries, such as those of a mask, would make the tolerance infinite.
        finite = a[torch.isfinite(a)].double().abs()
        largest = max(1.0, float(finite.max())) if finite.numel() else 1.0
        tolerance = ulps * torch.finfo(a.dtype).eps * largest
        if not torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance, equal_nan=True):
            odd = [int((~torch.isfinite(t)).sum()) for t in (a, b)]
            if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
                return (
                    f"{name} has {odd[0]} values that are inf or NaN in the module and {odd[1]} in the capture, of "
                    f"{a.numel()}; check the masks of the example inputs"
                )
            worst = (a.double() - b.double()).nan_to_num().abs().max()
            return f"{name} differs by {float(worst):.3g} (allowed {tolerance:.3g})"
    return None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _same_state(module: nn.Module) -> Iterator[None]:
    """Fix the random seed during the block, and restore the random state and the buffers after it.

    Without it, dropout or an updated running statistic would make the second run differ from the first.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
