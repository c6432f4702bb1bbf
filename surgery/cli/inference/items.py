"""Items to predict: texts, images and rows of files, in the order in which the user gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from surgery.cli.inference.runner import Runner
from surgery.common.errors import LoadError, nearest
from surgery.common.readers import first_line
from surgery.train.data import FORMATS, quiet, read_test_rows
from surgery.train.texts import TEXT_OR_IMAGE

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TENSORS = (".safetensors", ".npz")
STDIN = "-"


@dataclass(frozen=True)
class Item:
    """A text or an image.

    Attributes:
        name: what the user calls it: the text, or the path of the image, or the number of its row.
        value: the text, or an image in a form that `Images.read` reads.
    """

    name: str
    value: Any


def read_items(runner: Runner, given: Sequence[str], lines: Sequence[str], column: str | None) -> list[Item]:
    """Read the items that arguments name.

    Args:
        runner: the model. If it reads images, an argument that names no file is an error rather than a text.
        given: texts, files of rows (.csv, .jsonl, …), images, directories, and `-` for `lines`.
        lines: lines of the standard input: texts, or paths of images.
        column: column of the text or image in files of rows; None takes the one that looks like it.

    Raises:
        SurgeryError: a file does not exist or cannot be read.
    """
    images = runner.setting.images is not None
    found: list[Item] = []
    for argument in given:
        if argument == STDIN:
            found += [Item(line, line) for line in lines]
        elif is_table(argument):
            found += _rows(Path(argument), column)
        elif Path(argument).suffix.lower() in PICTURES and not Path(argument).is_dir():
            if not images:
                raise LoadError(f"{argument} is an image, and {runner.ref} reads texts")
            found.append(Item(argument, argument))
        elif images:
            raise LoadError(
                f"{argument!r} is no image; {runner.ref} reads files ({', '.join(PICTURES[:3])}, …), directories of "
                "them, and rows with a column of images"
            )
        else:
            found.append(Item(argument, argument))
    return found


def is_table(argument: str) -> bool:
    """True for a file of rows or a directory. Raises LoadError for such a file that does not exist."""
    if not argument:
        return False
    path = Path(argument)
    # A text may be too long to be a path.
    try:
        if path.is_dir():
            return True
        exists = path.is_file()
    except OSError:
        return False
    if path.suffix not in FORMATS and path.suffix.lower() not in (*PICTURES, *TENSORS):
        return False
    if not exists:
        # A sentence may end like a file name, but a name has no blanks.
        if " " in argument:
            return False
        raise LoadError(f"{argument} does not exist; check the path")
    return path.suffix in FORMATS


def _rows(path: Path, column: str | None) -> list[Item]:
    """The items of a file of rows, or of a directory of images or of such files."""
    pictures = sorted(file for file in path.glob("*") if file.suffix.lower() in PICTURES)
    if pictures:
        return [Item(str(file), str(file)) for file in pictures]
    if path.is_dir() and not any(file.suffix.lower() in (*PICTURES, *FORMATS) for file in path.rglob("*")):
        raise LoadError(
            f"{path} holds no images and no rows ({', '.join(FORMATS)}); name another directory or file"
        )
    rows = read_test_rows((path,))
    names = rows.column_names
    if column is not None and column not in names:
        raise LoadError(
            f"{path} has no column {column!r}{nearest(column, names) or '; it has ' + ', '.join(names)}"
        )
    chosen = column or next((name for name in TEXT_OR_IMAGE if name in names), None)
    if chosen is None:
        raise LoadError(
            f"{path} has no column of texts or images, only {', '.join(names)}; name one with --text"
        )
    with quiet():
        values = rows[chosen]
        found = []
        for number, value in enumerate(values):
            if value is None:
                raise LoadError(f"{path}: row {number} has no {chosen!r}; fix the data")
            found.append(Item(value if isinstance(value, str) else f"{path.name}:{number}", value))
    return found


def read_arrays(runner: Runner, path: Path) -> dict[str, Tensor]:
    """The inputs of a model from a file of arrays by input name; rows along the first axis.

    Raises:
        LoadError: the file cannot be read, or its arrays are not the inputs of the model.
    """
    if not path.is_file():
        raise LoadError(f"{path} does not exist; check the path")
    try:
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            from safetensors.torch import load_file

            found = load_file(path)
    except Exception as error:
        raise LoadError(f"{path} cannot be read: {first_line(error)}") from None
    wanted = runner.setting.inputs
    for name in found:
        if name not in wanted:
            raise LoadError(f"{path}: the model has no input {name!r}{nearest(name, wanted)}")
    missing = next((name for name in wanted if name not in found), None)
    if missing is not None:
        raise LoadError(f"{path} lacks the input {missing!r}; it needs {', '.join(wanted)}")
    counts = {name: value.shape[0] if value.dim() else 0 for name, value in found.items()}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        raise LoadError(
            f"{path}: the arrays have {counts} rows along their first axis; give as many of each, and at least one"
        )
    return {name: found[name].to(example.dtype) for name, example in wanted.items()}


def rows_of(inputs: Mapping[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Rows of every input."""
    return {name: value[start:end] for name, value in inputs.items()}
