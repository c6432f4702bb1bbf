"""`--data FILE`: what passes measure on, from a file of named tensors that can hold no code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from surgery.common.errors import SurgeryError, nearest
from surgery.engine.probe import InputSet
from surgery.engine.program import Program

data_option: Callable[..., Any] = click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Inputs by name (.safetensors, .npz) for passes that measure something; may be repeated.",
)


def read_data(program: Program, files: tuple[Path, ...]) -> list[InputSet]:
    """One set of inputs from each file, by the names of the program's inputs. Raises SurgeryError."""
    args, kwargs = program.example_inputs
    if files and args:
        raise SurgeryError(
            "--data names inputs, and this model takes them by position; from Python, apply(…, data=[(args, kwargs)])"
        )
    sets: list[InputSet] = []
    for path in files:
        found = _read(path)
        for name in found:
            if name not in kwargs:
                raise SurgeryError(f"{path}: the model has no input {name!r}{nearest(name, kwargs)}")
        missing = next((name for name in kwargs if name not in found), None)
        if missing:
            raise SurgeryError(f"{path} lacks the input {missing!r}; it needs {', '.join(kwargs)}")
        sets.append(((), {name: found[name].to(kwargs[name].dtype) for name in kwargs}))
    return sets


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SurgeryError(f"--data {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            import numpy

            with numpy.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:
        raise SurgeryError(f"--data {path} cannot be read: {str(error).splitlines()[0]}") from None
    raise SurgeryError(f"--data {path}: give a .safetensors or .npz file of tensors by input name")
