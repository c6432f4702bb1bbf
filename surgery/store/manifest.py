"""Types of the fields in the manifest of a saved directory, checked before any of them is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from surgery.common.errors import JournalError
from surgery.engine.schema import Json, Natural, Text

Hash = Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Literal["inserted.safetensors", "changed.safetensors", "base.safetensors"]


class _StoredLoader(BaseModel):
    # It is part of the advice `pip install …` for an absent plugin.
    distribution: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._-]{0,128}$")] = ""
    version: Text = ""


class _StoredHub(BaseModel):
    repo: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._/-]{1,200}$")]
    commit: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{40,64}$")]


class _StoredBase(BaseModel):
    model_config = ConfigDict(extra="allow")

    ref: Text
    task: Text | None
    model_kwargs: Json
    example: dict[Text, Natural]
    random: StrictBool | None = None
    input: list[Text] = []
    hub: _StoredHub | None = None
    files: dict[Text, Hash]
    graph: Hash
    loader: _StoredLoader = _StoredLoader()
    sites: list[tuple[Text, Text, list[StrictInt], Text, Natural]]


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="allow")

    base: _StoredBase
    journal: list[Any]
    parameters: list[Text] | None = None
    labels: dict[Text, list[Text]] | None = None
    files: dict[FileName, Hash]


def check_manifest(manifest: Any, path: Path) -> dict[str, Any]:
    """Check the types of a manifest and return it with all fields that the loader reads.

    Args:
        manifest: The parsed JSON.
        path: Its file, for messages.

    Raises:
        JournalError: A field is missing or has another type; the message names it.
    """
    try:
        checked = _Manifest.model_validate(manifest)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])[:200]
        raise JournalError(
            f"{path} cannot be read: {where}: {problem['msg'].removeprefix('Value error, ')}; "
            "it was not written by surgery"
        ) from None
    return {
        **manifest,
        "parameters": checked.parameters,
        "labels": checked.labels,
        "base": {**manifest["base"], "sites": [list(row) for row in checked.base.sites]},
    }
