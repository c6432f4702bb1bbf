"""Types and ranges of the fields in a stored journal, checked before any of them is used.

A journal can come from an untrusted source. Its names must be plain (see surgery.common.names), and its numbers finite
and of the right type. The values under `decided` are defined by the passes; `replay.check_fit` compares the tensors
that follow from them with the stored tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from surgery.common.errors import JournalError
from surgery.common.names import is_plain

_MOST = 2**31 - 1  # of a step, a dimension or an ordinal; larger numbers are no sizes of a model
_LARGEST = 1e30  # a float32 holds it, with room for products
_DEEPEST = 32  # nesting of a JSON value


def _plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError("must be letters, digits, _ and - between dots")
    return name


def _short(text: str) -> str:
    if len(text) > 4096 or not text.isprintable():
        raise ValueError("must be a line of text")
    return text


def check_depth(value: Any, depth: int = 0) -> Any:
    """A JSON value. Raises ValueError if it is nested too deeply, or a number in it is not finite or beyond 1e30."""
    if depth > _DEEPEST:
        raise ValueError("is nested too deeply")
    if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
        raise ValueError(f"has a number that is not within ±{_LARGEST:g}")
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in inner:
        check_depth(item, depth + 1)
    return value


Text = Annotated[StrictStr, AfterValidator(_short)]
Plain = Annotated[StrictStr, AfterValidator(_plain)]
Id = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,128}(:[A-Za-z0-9_-]{0,128}){0,2}$")]
Natural = Annotated[StrictInt, Field(ge=0, le=_MOST)]
Json = Annotated[dict[StrictStr, Any], AfterValidator(check_depth)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Key(_Strict):
    owner: Text  # a name in the base, which has to be there
    kind: Id
    ordinal: Natural


class _Record(_Strict):
    key: _Key
    path: Text
    decided: Json
    tensors: dict[Text, Text]


class StoredEntry(_Strict):
    """One entry of a journal as JSON has it."""

    id: Id
    pass_name: Annotated[Id, Field(alias="pass")]
    kind: Literal["rewrite", "select", "merge"]
    # It is part of the advice `pip install …` for an absent plugin.
    distribution: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._-]{0,128}$")]
    distribution_version: Text
    version: Annotated[StrictInt, Field(ge=1, le=_MOST)]
    options: Json
    sites: list[_Record]
    trains: dict[Text, StrictBool]
    rates: dict[Text, FiniteFloat] = {}
    windows: dict[Text, tuple[Natural, Natural | None]] = {}
    unit: Literal["step", "epoch"] = "step"
    masks: dict[Text, Text] = {}
    before: dict[Text, Text] = {}
    limits: dict[Text, Natural] = {}
    numerics: Json
    weight: Annotated[FiniteFloat, Field(ge=-_LARGEST, le=_LARGEST)]
    auto: StrictBool
    call: Natural = 0

    @model_validator(mode="after")
    def _names_entries(self) -> StoredEntry:
        for key in ("folded", "simplified") if self.kind == "merge" else ():
            names = self.options.get(key, [])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"options.{key} must be a list of entries")
        return self


def check_entry(data: Any, number: int) -> None:
    """Check one entry of a stored journal.

    Raises:
        JournalError: A field is missing, has another type, or is out of range; the message names it.
    """
    try:
        StoredEntry.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])[:200]
        said = problem["msg"].removeprefix("Value error, ")
        raise JournalError(
            f"entry {number} of the journal cannot be read: {where or 'it'}: {said}; "
            "the file was not written by surgery"
        ) from None
    except RecursionError:
        raise JournalError(f"entry {number} of the journal is nested too deeply") from None
