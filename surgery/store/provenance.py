"""A file beside weights in the format of another library that says how surgery made them: base, journal, hashes.

Transformers and PEFT do not read it. A model card is written from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictStr, ValidationError

from surgery.common.errors import LoadError
from surgery.common.files import core_version
from surgery.common.readers import read_json
from surgery.engine.base import Base, sha256
from surgery.engine.journal import Journal
from surgery.engine.program import Program
from surgery.engine.schema import Text

PROVENANCE = "surgery_provenance.json"
Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._/-]{0,200}$")]


class Origin(BaseModel):
    """The base of a program, without paths of this machine.

    Attributes:
        ref: Reference; of a directory, its last component only.
        repo: Repository on the hub, "" for local files.
        commit: Its commit hash.
        task: Name of the transformers task.
    """

    ref: Text = ""
    repo: Name = ""
    commit: Name = ""
    task: Text | None = None


class _Stored(BaseModel):
    format: Literal["hf", "peft"]
    base: Origin
    class_name: Text = ""
    journal: list[Any]
    files: dict[Text, Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]]


@dataclass(frozen=True)
class Provenance:
    """Contents of the file.

    Attributes:
        format: "hf" or "peft".
        base: The base.
        class_name: Class of the model in transformers.
        journal: The journal.
    """

    format: str
    base: Origin
    class_name: str
    journal: Journal


def origin_of(base: Base) -> Origin:
    """The base of a program as it may be told to others."""
    scheme, colon, name = base.ref.partition(":")
    # A directory is named by its last component, since a whole path tells about the machine.
    ref = (
        f"{scheme}:{Path(name).name}" if scheme in ("hf", "diffusers") and not base.loaded.repo else base.ref
    )
    ref = ref if colon else Path(base.ref).name
    return Origin(
        ref=ref, repo=base.loaded.repo, commit=base.loaded.commit, task=base.loaded.metadata.get("task")
    )


def write_provenance(program: Program, folder: Path, format_: Literal["hf", "peft"]) -> None:
    """Write the file into a directory that holds the weights already."""
    facts = {
        "schema": 1,
        "written_by": {"torch-surgery": core_version()},
        "format": format_,
        "base": origin_of(program.base).model_dump(),
        "class_name": type(program.base.loaded.model).__name__,
        "journal": program.journal.to_json(),
        "files": {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))},
    }
    (folder / PROVENANCE).write_text(json.dumps(facts, indent=1))


def read_provenance(folder: Path) -> Provenance:
    """Read the file and compare the weights with it.

    Raises:
        LoadError: The file is damaged, or a file of weights is missing or was changed.
        JournalError: The journal is damaged.
    """
    path = folder / PROVENANCE
    try:
        stored = _Stored.model_validate(read_json(path, LoadError, "write the directory again"))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])[:200]
        raise LoadError(
            f"{path} cannot be read: {where}: {problem['msg']}; write the directory again"
        ) from None
    _check_files(folder, stored.files)
    return Provenance(stored.format, stored.base, stored.class_name, Journal.from_json(stored.journal))


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    there = {file.name for file in folder.glob("*.safetensors")}
    for name in sorted({*there, *files}):
        if name not in there:
            raise LoadError(f"{folder} has no {name} now; write the directory again")
        if name not in files or sha256(folder / name) != files[name]:
            raise LoadError(f"{folder / name} is not as surgery wrote it; write the directory again")
