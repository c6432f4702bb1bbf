"""What an exported file says about its tensors: read back without running it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.common.errors import ExportError
from surgery.export import metadata_keys
from surgery.export.optional import require


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file.

    name: in the file. source: the program's name for it, where the file stores it transposed, else `name`.
    tied: the program's other names for it.
    pass_name, instance, site: the pass that made it, under which name, where; empty for base weights.
    nodes: names of the nodes that carry the same provenance.
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
    """Every tensor of the file by its name in the file, constants that the exporter made included.

    Raises ExportError where the file cannot be read.
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
        found[name] = StoredTensor(
            name=name,
            source=meta.get(metadata_keys.SOURCE, name),
            shape=tuple(value.const_value.shape),
            dtype=value.const_value.dtype.name.lower(),
            tied=tuple(json.loads(meta.get(metadata_keys.TIED, "[]"))),
            pass_name=place[0],
            instance=place[1],
            site=place[2],
            nodes=tuple(by_place.get(place, ())),
        )
    return found


def names_survive(path: Path) -> dict[str, str]:
    """Each of the program's names that the file knows, tied ones too, with the tensor that holds it."""
    held: dict[str, str] = {}
    for name, tensor in provenance_of(path).items():
        for known in (tensor.source, *tensor.tied):
            held[known] = name
    return held


def journal_of(path: Path) -> Any:
    """The journal that the file was exported with, None where there is none."""
    text = _load(path).metadata_props.get(metadata_keys.JOURNAL)
    return None if text is None else json.loads(text)


def _place(meta: Mapping[str, str]) -> tuple[str, str, str]:
    return (
        meta.get(metadata_keys.PASS, ""),
        meta.get(metadata_keys.NAME, ""),
        meta.get(metadata_keys.SITE, ""),
    )


def _load(path: Path) -> Any:
    ir = require("onnx_ir")
    try:
        return ir.load(path)
    except Exception as error:
        raise ExportError(f"'{path}' cannot be read as ONNX: {type(error).__name__} {error}") from error
