"""Several data sets as one: a table whose columns are called NAME/COLUMN, and `set`, which says whose a row is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery.common.errors import TrainingError
from surgery.train.data import Rows, quiet
from surgery.train.data_context import Row

SET = "set"


def joined(parts: Mapping[str, Rows]) -> Rows:
    """All rows of several data sets. Raises TrainingError where some have rows held out and others none."""
    without = [name for name, rows in parts.items() if rows.held_out is None]
    if without and len(without) < len(parts):
        raise TrainingError(
            f"the data {without[0]!r} has no rows held out, and {next(n for n in parts if n not in without)!r} has; "
            f"give --held-out a share"
        )
    train = _stacked({name: rows.train for name, rows in parts.items()})
    return Rows(train, None if without else _stacked({name: rows.held_out for name, rows in parts.items()}))


def names_in(rows: Any) -> list[str]:
    """The names of the data sets in a joined table; none of one that is not joined."""
    return list(rows.unique(SET)) if SET in rows.column_names and _prefixed(rows) else []


def part_of(rows: Any, name: str) -> Any:
    """The rows of one data set, with its columns by their own names."""
    with quiet():
        chosen = np.flatnonzero(np.asarray(rows[SET]) == name)
        own = {
            column: column.removeprefix(f"{name}/")
            for column in rows.column_names
            if column.startswith(f"{name}/")
        }
        return rows.select(chosen).select_columns(list(own)).rename_columns(own)


def row_of(row: Row) -> tuple[str, Row]:
    """The name of a joined row's data set, and the row itself."""
    name = row[SET]
    return name, {
        column.removeprefix(f"{name}/"): value
        for column, value in row.items()
        if column.startswith(f"{name}/")
    }


def _prefixed(rows: Any) -> bool:
    return all("/" in column for column in rows.column_names if column != SET)


def _stacked(tables: Mapping[str, Any]) -> Any:
    from datasets import concatenate_datasets

    with quiet():
        named = [
            table.rename_columns({column: f"{name}/{column}" for column in table.column_names}).add_column(
                SET, [name] * len(table)
            )
            for name, table in tables.items()
        ]
        return concatenate_datasets(named)
