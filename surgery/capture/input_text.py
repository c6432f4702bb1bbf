"""Example inputs as text: "x=float32[batch=2,3,h=224,w=224]".

Each dimension is a fixed size, or a name as in surgery.capture.ranges: named dimensions are dynamic. A name has its
example size where it occurs first.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.capture.ranges import Dimension, parse_dimension
from surgery.common.errors import CaptureError, nearest

_TEXT = re.compile(r"\s*(?P<name>[^=\[\]]+?)\s*=\s*(?P<dtype>\w+)\s*\[(?P<shape>[^\[\]]*)\]\s*")
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_MOST_VALUES = 2**28  # of one input: a file may name it
_SMALLEST = 2  # torch.export fixes a dimension whose example size is 0 or 1
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_EXAMPLE = "'x=float32[batch=2,3,h=224,w=224]'"


@dataclass(frozen=True)
class Described:
    """Example inputs and their dynamic dimensions, as `from_module` takes them."""

    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]


def describe(texts: Sequence[str], seed: int = 0) -> Described:
    """Make example inputs. Integers are 0 or 1, which are valid as tokens, masks and flags.

    Args:
        texts: Inputs as text, each NAME=DTYPE[DIM,…]; several in one text are separated by ";".
        seed: Seed of the random values.

    Raises:
        CaptureError: A text cannot be read, or a dimension has two sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    inputs, dynamic = dict[str, torch.Tensor](), dict[str, dict[int, str]]()
    for text in (part for given in texts for part in given.split(";") if part.strip()):
        found = _TEXT.fullmatch(text)
        if found is None or not found["name"].isidentifier():
            raise CaptureError(f"--input {text.strip()[:120]!r} cannot be read; write it as {_EXAMPLE}")
        name, kind = found["name"], found["dtype"]
        if kind not in _DTYPES:
            raise CaptureError(f"--input {name}: unknown dtype {kind!r}{nearest(kind, _DTYPES)}")
        if name in inputs:
            raise CaptureError(f"--input {name} is given twice; remove one")
        axes = [axis.strip() for axis in found["shape"].split(",")] if found["shape"].strip() else []
        shape = [_size(name, axis, sizes) for axis in axes]
        if torch.Size(shape).numel() > _MOST_VALUES:
            raise CaptureError(f"--input {name} has over {_MOST_VALUES} values; give smaller example sizes")
        inputs[name] = _values(shape, getattr(torch, kind), generator)
        dynamic[name] = {at: _range(axis) for at, axis in enumerate(axes) if not axis.isdecimal()}
    if not inputs:
        raise CaptureError(f"--input names no input; write it as {_EXAMPLE}")
    return Described(inputs, dynamic)


def _size(name: str, axis: str, sizes: dict[str, int]) -> int:
    """Example size of an axis; that of a name is noted in `sizes`."""
    if axis.isdecimal() and len(axis) < 10:
        return int(axis)
    found = parse_dimension(axis)
    size = _chosen(found) if found.size is None and found.has_range else found.size
    if size is None:
        size = sizes.get(found.name)
    if size is None:
        raise CaptureError(
            f"--input {name}: {found.name} has no size; write {found.name}=SIZE where it is named first"
        )
    if sizes.setdefault(found.name, size) != size:
        raise CaptureError(
            f"--input {name}: {found.name} has the sizes {sizes[found.name]} and {size}; give it one"
        )
    outside = (found.low is not None and size < found.low) or (found.high is not None and size > found.high)
    if outside or size % found.step:
        raise CaptureError(
            f"--input {name}: the size {size} of {found.name} is outside its range in {axis!r}"
        )
    if size < _SMALLEST:
        raise CaptureError(
            f"--input {name}: {found.name}={size} cannot be dynamic; give an example size of at least 2"
        )
    return size


def _chosen(found: Dimension) -> int:
    """A size in a range: the smallest that is valid, and no smaller than 8 if there is room."""
    low = max(found.low or 0, _SMALLEST, min(8, found.high or 8))
    return -(-low // found.step) * found.step


def _range(axis: str) -> str:
    """The name with its range, without the example size."""
    found = parse_dimension(axis)
    if not found.has_range:
        return found.name
    bounds = f"{'' if found.low is None else found.low}..{'' if found.high is None else found.high}"
    return f"{found.name}={bounds}{f'/{found.step}' if found.step != 1 else ''}"


def _values(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def check_names(module: nn.Module, names: Iterable[str]) -> None:
    """Raise CaptureError if forward has no parameter of a name, or needs one that is not named."""
    parameters = inspect.signature(module.forward).parameters.values()
    given, kind = list(names), type(module).__name__
    known = [p.name for p in parameters if p.kind in _BY_NAME]
    for name in given:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            hint = nearest(name, known) or f"; it takes {', '.join(known)}"
            raise CaptureError(f"--input {name}: {kind}.forward has no such parameter{hint}")
    lacking = [
        p.name for p in parameters if p.kind in _BY_NAME and p.default is p.empty and p.name not in given
    ]
    if lacking:
        raise CaptureError(
            f"{kind}.forward needs the input {lacking[0]!r}; describe it too: {suggestion(module)}"
        )


def suggestion(module: nn.Module) -> str:
    """The options `--input` for a module, with the names of the parameters of its forward and a likely shape."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in _BY_NAME and p.default is p.empty]
    names = names or [p.name for p in parameters if p.kind in _BY_NAME][:1] or ["x"]
    return " ".join(f"--input '{name}={_likely(module)}'" for name in names)


def _likely(module: nn.Module) -> str:
    """DTYPE[SHAPE] that the first layer with a weight reads."""
    return next((shape for layer in module.modules() if (shape := _read_by(layer))), "float32[batch=2,8]")


def _read_by(layer: Any) -> str:
    """DTYPE[SHAPE] that a layer reads, or "" for a layer that tells nothing about it."""
    if isinstance(layer, nn.Embedding):
        return "int64[batch=2,seq=8]"
    if isinstance(layer, nn.Linear):
        return f"float32[batch=2,{layer.in_features}]"
    if isinstance(layer, (nn.LSTM, nn.GRU, nn.RNN)):
        axes = "batch=2,seq=8" if layer.batch_first else "seq=8,batch=2"
        return f"float32[{axes},{layer.input_size}]"
    for kind, axes in ((nn.Conv1d, "length=64"), (nn.Conv2d, "h=224,w=224"), (nn.Conv3d, "d=16,h=64,w=64")):
        if isinstance(layer, kind):
            return f"float32[batch=2,{layer.in_channels},{axes}]"
    return ""
