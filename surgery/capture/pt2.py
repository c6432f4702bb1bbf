"""Loader of `FILE.pt2`, a saved torch.export program; reading one requires the user's trust."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim

from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def load(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load `FILE.pt2`; return None for a reference without that suffix.

    Raises:
        LoadError: the file is a pickle (`.pt`, `.pth`, `.bin`, `.pkl`, `.ckpt`), the user does not trust the `.pt2`
            file, or it cannot be read.
    """
    path = Path(ref)
    if path.suffix in _PICKLES and ":" not in ref:
        raise LoadError(
            f"{ref}: a {path.suffix} file holds a pickle, which can run code when read, and no architecture; "
            "write a py: factory that builds the module and reads it with torch.load(..., weights_only=True)"
        )
    if path.suffix != ".pt2":
        return None
    if not path.is_file():
        raise LoadError(f"{ref}: there is no such file")
    if not options.trust:
        raise LoadError(
            f"{ref}: torch.export.load unpickles parts of a .pt2 file, which can run code; give --trust if you "
            "trust the source of the file"
        )
    try:
        with _no_log():
            program = torch.export.load(str(path))
        module = program.module(check_guards=False)
    except Exception as error:
        raise LoadError(
            f"{ref}: torch.export.load failed: {(str(error).splitlines() or [''])[0][:200]}"
        ) from error
    if program.example_inputs is None:
        raise LoadError(f"{ref}: the file holds no example inputs; save it again with torch.export.save")
    args, kwargs = program.example_inputs
    return LoadedModel(
        module=module,
        args=tuple(args),
        kwargs=dict(kwargs),
        dynamic_shapes=_dynamic(program, module, args, kwargs),
        files=(path,),
        metadata={"loader": "pt2", "source": str(path)},
    )


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """Disable logging inside the block: the exception for a damaged archive says more than torch's log."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


def _dynamic(program: Any, module: fx.GraphModule, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Dynamic shapes from the symbolic sizes of the saved inputs.

    The first symbol on an axis 0 is named `batch`; others are named `dim` and their number (`dim1`, `dim2`, ...).
    Returns None if no dimension is dynamic or the dynamic ones cannot be named.
    """
    dims: dict[Any, Any] = {}
    values = iter([*args, *kwargs.values()])
    names = set(program.graph_signature.user_inputs)
    shapes: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names:
            continue
        value, fake = next(values, None), node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(fake, torch.Tensor):
            # A container input has several placeholders, so placeholders and inputs no longer correspond
            # one to one. All dimensions stay static.
            return None
        spec: dict[int, Any] = {}
        for axis, size in enumerate(fake.shape):
            if isinstance(size, int):
                continue
            symbol = size.node.expr
            # A derived size such as 2*s0 has no Dim of its own.
            if not symbol.is_symbol:
                return None
            if symbol not in dims:
                taken = {dim.__name__ for dim in dims.values()}
                name = "batch" if axis == 0 and "batch" not in taken else f"dim{len(dims) + 1}"
                dims[symbol] = Dim(name, **_bounds(program.range_constraints.get(symbol)))
            spec[axis] = dims[symbol]
        shapes[node.name] = spec or None
    return shapes if dims else None


def _bounds(limits: Any) -> dict[str, int]:
    """`min` and `max` arguments of a Dim from torch's value range; an unbounded end is omitted."""
    if limits is None:
        return {}
    bounds = {"min": int(limits.lower)} if limits.lower > 0 else {}
    if limits.upper < (1 << 30):
        bounds["max"] = int(limits.upper)
    return bounds
