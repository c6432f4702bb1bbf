"""Joins several data sets into one table with columns NAME/COLUMN. The column `set` names the data set of each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery.common.errors import TrainingError
from surgery.train.data import Rows, quiet
from surgery.train.data_context import Row

SET = "set"


def joined(parts: Mapping[str, Rows]) -> Rows:
    """Join the rows of several data sets.

    Raises:
        TrainingError: only some of them have held-out rows.
    """
    without = [name for name, rows in parts.items() if rows.held_out is None]
    if without and len(without) < len(parts):
        raise TrainingError(
            f"data set {without[0]!r} has no held-out rows, but {next(n for n in parts if n not in without)!r} has; "
            f"set --held-out to a share"
        )
    train = _stacked({name: rows.train for name, rows in parts.items()})
    return Rows(train, None if without else _stacked({name: rows.held_out for name, rows in parts.items()}))


def names_in(rows: Any) -> list[str]:
    """Return the names of the data sets in a joined table, or [] if the table is not joined."""
    return list(rows.unique(SET)) if SET in rows.column_names and _prefixed(rows) else []


def part_of(rows: Any, name: str) -> Any:
    """Return the rows of one data set, with the original column names."""
    with quiet():
        chosen = np.flatnonzero(np.asarray(rows[SET]) == name)
        own = {
            column: column.removeprefix(f"{name}/")
            for column in rows.column_names
            if column.startswith(f"{name}/")
        }
        return rows.select(chosen).select_columns(list(own)).rename_columns(own)


def row_of(row: Row) -> tuple[str, Row]:
    """Return the name of a joined row's data set, and the original row."""
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
