"""Reads rows from files and directories with `datasets`, and makes examples from them."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.common.errors import MissingExtraError, SurgeryError, TrainingError
from surgery.train.data_context import Setting
from surgery.train.examples import Examples
from surgery.train.objective import Objective

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_COLUMN = "column "
HELD_OUT = ("validation", "valid", "dev", "test")


@dataclass(frozen=True)
class Rows:
    """Rows of a data set.

    Attributes:
        train: rows to train on (a datasets.Dataset).
        held_out: rows to evaluate on, or None.
    """

    train: Any
    held_out: Any = None


def read_rows(files: Sequence[Path], held_out: Sequence[Path] = ()) -> Rows:
    """Read rows from files of one format or from one directory.

    Args:
        files: files of one format, or a single directory. A directory may have its own held-out split.
        held_out: files to evaluate on instead of the directory's split.

    Returns:
        The rows, with `held_out` None if there is nothing to evaluate on.

    Raises:
        TrainingError: a file cannot be read, or contains no rows.
        MissingExtraError: datasets is not installed.
    """
    if len(files) == 1 and files[0].is_dir():
        splits = _load(str(files[0]), files)
        names = [name for name in HELD_OUT if name in splits]
        train = splits.get("train")
        if train is None:
            raise TrainingError(f"{files[0]} has no 'train' split, only {', '.join(splits)}; add one")
        rows = Rows(train, splits[names[0]] if names else None)
    else:
        rows = Rows(_read_files(files))
    if held_out:
        rows = Rows(rows.train, _read_files(held_out))
    for part in (rows.train, rows.held_out):
        if part is not None and not len(part):
            raise TrainingError(f"{', '.join(map(str, files))} contains no rows; add data")
    return rows


def read_test_rows(files: Sequence[Path]) -> Any:
    """Read the rows that a finished model is judged on.

    Args:
        files: files of one format, or a single directory. Of a directory with several splits, the held-out one counts.

    Returns:
        The rows (a datasets.Dataset).

    Raises:
        TrainingError: a file cannot be read, or contains no rows.
        MissingExtraError: datasets is not installed.
    """
    if len(files) == 1 and files[0].is_dir():
        splits = _load(str(files[0]), files)
        name = next((name for name in (*HELD_OUT, "train") if name in splits), None)
        if name is None:
            raise TrainingError(f"{files[0]} has no split 'test', only {', '.join(splits)}; name its files")
        found = splits[name]
    else:
        found = _read_files(files)
    if not len(found):
        raise TrainingError(f"{', '.join(map(str, files))} contains no rows; add data")
    return found


def split(rows: Rows, share: float, seed: int) -> Rows:
    """Hold out a share of the rows, unless some are held out already.

    Args:
        rows: rows to split.
        share: share to hold out, below 1 (0: none).
        seed: seed of the random split.

    Raises:
        TrainingError: one part of the split would be empty.
    """
    if rows.held_out is not None or not share:
        return rows
    size = round(len(rows.train) * share)
    if not size or size == len(rows.train):
        raise TrainingError(
            f"{share:g} of {len(rows.train)} rows is {size} rows; give more data, or another --held-out (0: none)"
        )
    parts = rows.train.train_test_split(test_size=size, seed=seed)
    return Rows(parts["train"], parts["test"])


def together(rows: Rows) -> Any:
    """Join the training and held-out rows, for decisions that depend on all data.

    Raises:
        TrainingError: the held-out rows have other columns.
    """
    if rows.held_out is None:
        return rows.train
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets([rows.train, rows.held_out])
    except ValueError as error:
        raise TrainingError(
            f"the held-out data has other columns than the training data; rename them: {error}"
        ) from None


def _read_files(files: Sequence[Path]) -> Any:
    kinds = set()
    for path in files:
        if not path.is_file():
            raise TrainingError(f"{path} does not exist; check the path")
        if not path.stat().st_size:
            raise TrainingError(f"{path} is empty; add data")
        if path.suffix not in FORMATS:
            raise TrainingError(f"{path} has an unknown format; give {', '.join(FORMATS)} or a directory")
        kinds.add(path.suffix)
    if len(kinds) > 1:
        raise TrainingError(f"the files have several formats ({', '.join(sorted(kinds))}); give files of one")
    (kind,) = kinds
    more = {"sep": _separator(files[0], kind)} if FORMATS[kind] == "csv" else {}
    return _load(FORMATS[kind], files, data_files=[str(path) for path in files], **more)["train"]


def _separator(path: Path, kind: str) -> str:
    """The character between the columns of a table: a tab in .tsv, else the one that gives the header most columns.

    Spreadsheets write semicolons into .csv where the decimal sign is a comma.
    """
    if kind == ".tsv":
        return "\t"
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        header = file.readline()
    return max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), ())))


def _load(name: str, files: Sequence[Path], **options: Any) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingExtraError("datasets", "train") from None
    with quiet():
        try:
            return datasets.load_dataset(name, **options)
        except Exception as error:
            cause = error.__cause__ or error  # datasets reports where it failed, the cause reports why
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            raise TrainingError(f"{', '.join(map(str, files))} cannot be read: {reason}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of datasets."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def make_examples(rows: Any, objective: Objective, setting: Setting) -> Examples:
    """Make the examples of all rows.

    Args:
        rows: a datasets.Dataset.
        objective: objective that makes examples of a row.
        setting: data context, prepared by the objective.

    Raises:
        SurgeryError: a row is invalid. The error names the row and has the type the objective raised.
        TrainingError: no row gives an example.
    """

    def of(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        made: list[dict[str, Any]] = []
        for place, number in enumerate(numbers):
            row = {name.removeprefix(_COLUMN): values[place] for name, values in batch.items()}
            try:
                made += [{**example, "row": number} for example in objective.examples(row, setting)]
            except SurgeryError as error:
                raise type(error)(f"row {number}: {error}") from None
        names = made[0] if made else {}
        return {name: [example[name] for example in made] for name in names}

    with quiet():
        # Fields of examples may have the names of columns. Then datasets would cast them to the type of the column.
        rows = rows.rename_columns({name: f"{_COLUMN}{name}" for name in rows.column_names})
        found = rows.map(
            of, batched=True, with_indices=True, remove_columns=rows.column_names, keep_in_memory=True,
            load_from_cache_file=False, new_fingerprint="examples",
        )  # fmt: skip
    if not len(found):
        why = ", ".join(setting.counts)
        raise TrainingError(f"none of the {len(rows)} rows can be used; each {why}")
    return Examples(found, [objective.size(example) for example in found])
