"""Readers of the metadata in an exported file: tensors, provenance and journal. The file is not run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.common.errors import ExportError
from surgery.export import metadata_keys
from surgery.export.optional import require
from surgery.export.untrusted import read_checked


@dataclass(frozen=True)
class StoredTensor:
    """A tensor stored in an exported file.

    Attributes:
        name: name in the file.
        source: name in the program; it differs from `name` if the file stores the tensor transposed.
        shape: shape in the file.
        dtype: ONNX data type in lower case.
        tied: other names of the tensor in the program.
        pass_name: the pass that created or changed the tensor; "" for unchanged base weights.
        instance: name of that pass instance, or "".
        site: path of the layer that the pass was applied to, or "".
        nodes: names of the nodes with the same provenance.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    tied: tuple[str, ...]
    pass_name: str
    instance: str
    site: str
    nodes: tuple[str, ...]


def provenance_of(path: Path) -> dict[str, StoredTensor]:
    """Read all tensors of a file by name, including constants that the exporter created.

    Raises:
        ExportError: the file cannot be read.
    """
    model = _load(path)
    by_place: dict[tuple[str, str, str], list[str]] = {}
    for node in model.graph:
        place = _place(node.metadata_props)
        if place[0]:
            by_place.setdefault(place, []).append(node.name)
    found = {}
    for name, value in model.graph.initializers.items():
        meta, place = value.metadata_props, _place(value.metadata_props)
        if value.const_value is None:
            raise ExportError(f"'{path}' has no data for the tensor {name!r}; export it again")
        found[name] = StoredTensor(
            name=name,
            source=meta.get(metadata_keys.SOURCE, name),
            shape=tuple(value.const_value.shape),
            dtype=value.const_value.dtype.name.lower(),
            tied=tuple(_parsed(meta.get(metadata_keys.TIED, "[]"), path, metadata_keys.TIED, str)),
            pass_name=place[0],
            instance=place[1],
            site=place[2],
            nodes=tuple(by_place.get(place, ())),
        )
    return found


def names_survive(path: Path) -> dict[str, str]:
    """Map each of the program's tensor names in the file, including tied names, to the tensor that stores it."""
    held: dict[str, str] = {}
    for name, tensor in provenance_of(path).items():
        for known in (tensor.source, *tensor.tied):
            held[known] = name
    return held


def journal_of(path: Path) -> Any:
    """Read the journal that the program had when it was exported; None if the file has no journal.

    Raises:
        ExportError: the file cannot be read, or its journal is damaged.
    """
    text = _load(path).metadata_props.get(metadata_keys.JOURNAL)
    return None if text is None else _parsed(text, path, metadata_keys.JOURNAL, dict)


def facts_of(path: Path) -> tuple[Any, Any]:
    """Read the facts about the base and the result of the parity check; None for each that the file does not have.

    Raises:
        ExportError: the file cannot be read, or its metadata are damaged.
    """
    props = _load(path).metadata_props
    found = []
    for key in (metadata_keys.BASE, metadata_keys.PARITY):
        try:
            value = json.loads(props.get(key, "null"))
        except (ValueError, RecursionError):
            value = ""
        if value is not None and not isinstance(value, dict):
            raise ExportError(f"'{path}' has damaged metadata in {key}; export it again")
        found.append(value)
    return found[0], found[1]


def _parsed(text: str, path: Path, key: str, kind: type) -> list[Any]:
    """A list of values of one type from a metadata text. Raises ExportError for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise ExportError(f"'{path}' has damaged metadata in {key}; export it again")
    return found


def _place(meta: Mapping[str, str]) -> tuple[str, str, str]:
    """Pass, instance name and site from metadata; "" for each one that is missing."""
    return (
        meta.get(metadata_keys.PASS, ""),
        meta.get(metadata_keys.NAME, ""),
        meta.get(metadata_keys.SITE, ""),
    )


def _load(path: Path) -> Any:
    ir = require("onnx_ir")
    read_checked(path)
    try:
        return ir.load(path)
    except Exception as error:
        raise ExportError(f"'{path}' cannot be read as ONNX: {type(error).__name__} {error}") from error
