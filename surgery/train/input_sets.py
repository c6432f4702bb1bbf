"""Model inputs from rows of text or images, without labels: for calibration and for checks of exported files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from surgery.common.errors import TrainingError
from surgery.engine.probe import InputSet
from surgery.engine.program import Program
from surgery.train.data import FORMATS, quiet, read_rows
from surgery.train.data_context import Setting
from surgery.train.texts import TEXT_OR_IMAGE, read
from surgery.train.tokenizers import find_tokenizer

ROWS = 512  # rows that are used at most
_BATCH = 16


def holds_rows(path: Path) -> bool:
    """True if a path has the suffix of a table, or is a directory."""
    return path.suffix in FORMATS or path.is_dir()


def input_sets(program: Program, files: Sequence[Path], rows: int = ROWS) -> list[InputSet]:
    """Make input sets from the first rows of a data set, in batches of 16.

    Args:
        program: the program.
        files: files of one format, or one directory, with a column of texts or images.
        rows: number of rows to use at most.

    Raises:
        TrainingError: the data cannot be read, or the program's inputs cannot be made from them.
        MissingExtraError: datasets is not installed.
    """
    table = read_rows(tuple(files)).train
    setting = Setting.of(program, find_tokenizer(program))
    setting.need_reader("data")
    column = next((name for name in TEXT_OR_IMAGE if name in table.column_names), None)
    if column is None:
        raise TrainingError(
            f"{', '.join(map(str, files))} has no column of texts or images, only {', '.join(table.column_names)}; "
            f"name it {TEXT_OR_IMAGE[0]!r}"
        )
    setting = replace(setting, columns={"text": column})
    with quiet():
        found = [read(row, setting) for row in table.select(range(min(rows, len(table))))]
    found.sort(key=lambda example: len(example.get("input_ids", ())))
    batches = [found[start : start + _BATCH] for start in range(0, len(found), _BATCH)]
    return [((), setting.pad(batch)) for batch in batches]
