"""Predictions in the terminal, in pipes and in files."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from safetensors.numpy import save as safetensors_bytes
from torch import Tensor

from surgery.cli.inference.items import STDIN, TENSORS, Item, is_table, read_arrays, read_items
from surgery.cli.inference.predict import Question, best, predict, predict_arrays, question
from surgery.cli.inference.runner import Runner
from surgery.cli.render import console
from surgery.common.errors import SurgeryError
from surgery.common.files import refuse_file, write_bytes

NUMBERS, RECORDS = (".npy", ".safetensors"), (".jsonl", ".csv")
_SHOWN = 4  # numbers of an embedding that a line shows


def check_output(output: Path | None, overwrite: bool) -> None:
    """Check the file of -o before a model is loaded.

    Raises:
        SurgeryError: it has another suffix, or exists.
    """
    if output is None:
        return
    if output.suffix not in (*NUMBERS, *RECORDS):
        raise SurgeryError(
            f"-o {output}: predictions are written as {', '.join((*NUMBERS, *RECORDS))}; choose one of these"
        )
    refuse_file(output, overwrite)


def tell_predictions(
    runner: Runner,
    given: Sequence[str],
    *,
    form: Any,
    output_name: str | None,
    column: str | None,
    pooling: Any,
    top: int,
    batch: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Predict items, and print or write the result.

    Args:
        runner: the model.
        given: arguments of the command.
        form: what to read of the output; None decides.
        output_name: name of the output; None decides.
        column: column of the text or image in files.
        pooling: pooling of embeddings.
        top: classes of each item.
        batch: items of a batch.
        output: file to write, or None to print.
        as_json: print JSON lines.

    Raises:
        SurgeryError: an item cannot be read.
    """
    asked = question(runner, form, output_name, pooling)
    names, rows = _predicted(runner, asked, given, column, batch)
    found = ((name, row) for name, row in zip(names, rows, strict=True))
    if output is not None:
        _write(output, asked, found, top)
        click.echo(f"wrote {output}: {len(names):,} rows", err=True)
    elif as_json:
        for name, row in found:
            click.echo(json.dumps(record(asked, name, row, top)))
    elif sys.stdout.isatty():
        _table(asked, found, top)
    else:
        for name, row in found:
            click.echo("\t".join([*cells(asked, row, top), " ".join(name.split())]))
    for sentence, count in runner.setting.counts.items():
        click.echo(f"note: {count} rows: each {sentence}", err=True)


def _predicted(
    runner: Runner, asked: Question, given: Sequence[str], column: str | None, batch: int
) -> tuple[list[str], Iterator[Tensor]]:
    """The names of the items, and their predictions."""
    tensors = [argument for argument in given if Path(argument).suffix in TENSORS and not is_table(argument)]
    if tensors and len(given) > 1:
        raise SurgeryError(f"{tensors[0]} holds inputs of the model; give it alone")
    if tensors:
        arrays = read_arrays(runner, Path(tensors[0]))
        count = len(next(iter(arrays.values())))
        return [f"{tensors[0]}:{i}" for i in range(count)], predict_arrays(runner, asked, arrays, batch)
    lines = [line.rstrip("\n") for line in sys.stdin] if STDIN in given else []
    items: list[Item] = read_items(runner, given, [line for line in lines if line.strip()], column)
    return [item.name for item in items], predict(runner, asked, items, batch)


def record(asked: Question, name: str, row: Tensor, top: int) -> dict[str, Any]:
    """One prediction as JSON-compatible values."""
    if asked.form != "classes":
        return {"input": name, asked.form: row.tolist()}
    chosen = best(row, asked.names, top)
    made: dict[str, Any] = {"input": name, "label": chosen[0][0], "probability": chosen[0][1]}
    if top > 1:
        made["top"] = [{"label": label, "probability": value} for label, value in chosen]
    return made


def cells(asked: Question, row: Tensor, top: int) -> list[str]:
    """One prediction as texts of columns: labels with probabilities, or numbers."""
    if asked.form == "classes":
        return [text for label, value in best(row, asked.names, top) for text in (label, f"{value:.4f}")]
    numbers = [f"{value:.6g}" for value in row.tolist()]
    if asked.form == "embedding" and sys.stdout.isatty() and len(numbers) > _SHOWN:
        return [f"{len(numbers)} numbers: {', '.join(numbers[:_SHOWN])}, …"]
    return numbers


def _table(asked: Question, found: Iterator[tuple[str, Tensor]], top: int) -> None:
    """Print a table, as wide as the terminal."""
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("input", overflow="ellipsis", no_wrap=True, ratio=1)
    for number in range(min(top, len(asked.names)) if asked.form == "classes" else 0):
        table.add_column("label" if not number else f"{number + 1}.", style="green" if not number else "")
        table.add_column("probability", justify="right")
    if asked.form != "classes":
        table.add_column(asked.form)
    for name, row in found:
        texts = cells(asked, row, top)
        table.add_row(" ".join(name.split()), *(texts if asked.form == "classes" else [", ".join(texts)]))
    console().print(table)


def _write(output: Path, asked: Question, found: Iterator[tuple[str, Tensor]], top: int) -> None:
    """Write a file of numbers (all rows in one array) or of records. It appears whole or not at all."""
    if output.suffix in NUMBERS:
        import numpy

        array = numpy.stack([row.numpy() for _, row in found])
        if output.suffix == ".npy":
            stream = io.BytesIO()
            numpy.save(stream, array, allow_pickle=False)
            write_bytes(output, stream.getvalue())
        else:
            title = "probabilities" if asked.form == "classes" else asked.form
            write_bytes(output, safetensors_bytes({title: array}))
        return
    if output.suffix == ".jsonl":
        lines = [json.dumps(record(asked, name, row, top)) for name, row in found]
        write_bytes(output, "".join(f"{line}\n" for line in lines).encode())
        return
    text = io.StringIO()
    out = csv.writer(text, lineterminator=os.linesep)
    for number, (name, row) in enumerate(found):
        values = cells(asked, row, top)
        if not number:
            titles = (
                [
                    f"{title}{'' if not i else i + 1}"
                    for i in range(len(values) // 2)
                    for title in ("label", "probability")
                ]
                if asked.form == "classes"
                else [f"{asked.form}{i}" for i in range(len(values))]
            )
            out.writerow(["input", *titles])
        out.writerow([name, *values])
    write_bytes(output, text.getvalue().encode())
