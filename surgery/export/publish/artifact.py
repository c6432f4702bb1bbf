"""A directory to upload: its format, what made it, and the files of it that may be uploaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from surgery.capture.hf_files import COMPANIONS
from surgery.common.errors import ExportError
from surgery.engine.journal import Journal
from surgery.export.readback import facts_of, journal_of
from surgery.store.provenance import PROVENANCE, Origin, read_provenance
from surgery.store.saved import is_saved

CARD = "README.md"
_ALWAYS = (CARD, "LICENSE*", "NOTICE*")
_FILES: dict[str, tuple[str, ...]] = {
    "hf": (
        "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]*_*/config.json",
        "[0-9]*_*/model.safetensors",
        "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", *COMPANIONS,
        PROVENANCE,
    ),
    "peft": ("adapter_config.json", "adapter_model.safetensors", *COMPANIONS, PROVENANCE),
    "onnx": (
        "*.onnx", "*.onnx.data", "*.onnx_adapter", "adapters.json", "export.json", "config.json",
        "generation_config.json", *COMPANIONS,
    ),
}  # fmt: skip
_PICKLES = (".bin", ".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".h5", ".npy")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HOW = "write it with surgery merge --format hf, export-peft or export"


@dataclass(frozen=True)
class Artifact:
    """A directory that surgery wrote.

    Attributes:
        folder: The directory.
        format: "hf", "peft" or "onnx".
        base: The base of the program.
        class_name: Class of the model in transformers, or "".
        journal: What was done to the base.
        parity: Output -> errors of an ONNX file against the program.
        files: Names of the files to upload.
        left_out: Names of the others.
    """

    folder: Path
    format: str
    base: Origin
    class_name: str
    journal: Journal
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    parity: dict[str, dict[str, float]] = field(default_factory=dict)


def read_artifact(folder: Path) -> Artifact:
    """Read a directory, and check what it holds.

    Raises:
        ExportError: Surgery did not write the directory in a format of another library, or it holds a pickle or a link.
        SurgeryError: Its provenance is damaged, or the weights are not as they were written.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is no directory; name the directory that surgery wrote")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    for name in names:
        if name.endswith(_PICKLES):
            raise ExportError(
                f"{folder / name} can be a pickle, which runs code where it is read; move it elsewhere"
            )
        if (folder / name).is_symlink():
            raise ExportError(f"{folder / name} is a link; replace it by the file, or move it elsewhere")
    if is_saved(folder):
        raise ExportError(f"{folder} is in surgery's own format, which nobody loads from the hub; {_HOW}")
    if PROVENANCE in names:
        found = read_provenance(folder)
        kept = _chosen(names, found.format)
        return Artifact(folder, found.format, found.base, found.class_name, found.journal, *kept)
    graphs = [name for name in names if name.endswith(".onnx") and "/" not in name]
    journal = next((entries for name in graphs if (entries := journal_of(folder / name)) is not None), None)
    if journal is None:
        raise ExportError(f"{folder} holds nothing that surgery wrote; {_HOW}")
    base, parity = Origin(), dict[str, dict[str, float]]()
    for name in graphs:
        facts, errors = facts_of(folder / name)
        base = _origin(facts, folder / name) if facts is not None else base
        parity.update(_errors(errors or {}, folder / name))
    return Artifact(folder, "onnx", base, "", Journal.from_json(journal), *_chosen(names, "onnx"), parity)


def _chosen(names: list[str], format_: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that may be uploaded, and the others."""
    patterns = (*_ALWAYS, *_FILES[format_])
    plain = [name for name in names if all(_PLAIN.fullmatch(part) for part in name.split("/"))]
    # A pattern without a folder is one of names in the directory itself.
    chosen = [
        name
        for name in plain
        if any(fnmatchcase(name, like) and name.count("/") == like.count("/") for like in patterns)
    ]
    return tuple(chosen), tuple(name for name in names if name not in chosen)


def _origin(facts: Any, path: Path) -> Origin:
    try:
        return Origin.model_validate(facts)
    except ValidationError:
        raise ExportError(f"'{path}' has damaged metadata on its base; export it again") from None


def _errors(found: dict[str, Any], path: Path) -> dict[str, dict[str, float]]:
    """The errors by output, checked. Raises ExportError if they are anything else."""
    for errors in found.values():
        numbers = isinstance(errors, dict) and all(
            isinstance(errors.get(key), (int, float)) for key in ("error", "optimised")
        )
        if not numbers:
            raise ExportError(f"'{path}' has damaged metadata on its parity; export it again")
    return found
