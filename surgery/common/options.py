"""What a user configures by name: a frozen pydantic model whose fields are its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from surgery.common.errors import SurgeryError, nearest


class Configured(BaseModel):
    """Unknown options are refused; instances are immutable and hashable.

    kind: what a message calls it. failure: what a wrong option raises.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    kind: ClassVar[str] = ""
    failure: ClassVar[type[SurgeryError]] = SurgeryError
    name: ClassVar[str] = ""

    def options(self) -> dict[str, Any]:
        """Every option, JSON-able: what is kept must not depend on what a later version has for a default."""
        return self.model_dump(mode="json", by_alias=True)

    def given_options(self) -> dict[str, Any]:
        """Options that differ from their defaults, JSON-able: what a person writes in a recipe."""
        return self.model_dump(mode="json", exclude_defaults=True, by_alias=True)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """An instance from untrusted options; `failure` in one sentence for an unknown or wrong one."""
        title = f"{cls.kind} {cls.name!r}" if cls.name else cls.kind
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            problem = error.errors()[0]
            if not problem["loc"]:  # what a validator says of several options together
                raise cls.failure(f"{title}: {problem['msg'].removeprefix('Value error, ')}") from None
            field = ".".join(part for part in problem["loc"] if isinstance(part, str))
            flag = "--" + field.replace("_", "-")
            if problem["type"] == "extra_forbidden":
                known = [f.alias or n for n, f in cls.model_fields.items()]
                hint = nearest(field, known) or f"; it has {', '.join(sorted(known))}"
                raise cls.failure(f"{title} has no option {flag}{hint}") from None
            shown = problem.get("input")
            if field == "as":
                raise cls.failure(
                    f"{title}: --as {shown!r} is no name; use letters, digits, - and _"
                ) from None
            said = problem["msg"].removeprefix("Value error, ")
            said = said if said != problem["msg"] else said.lower()
            raise cls.failure(f"{title}: {flag} is {shown!r}: {said}") from None


def describe_options(configured: type[Configured]) -> list[dict[str, Any]]:
    """The options from its schema: name, type, default, description."""
    rows = []
    for name, info in configured.model_fields.items():
        annotation = info.annotation
        shown = getattr(annotation, "__name__", None) if not hasattr(annotation, "__args__") else None
        rows.append(
            {
                "option": "--" + (info.alias or name).replace("_", "-"),
                "type": shown or str(annotation).replace("typing.", "").replace(" | None", ""),
                "default": None if info.is_required() else info.default,
                "required": info.is_required(),
                "description": info.description or "",
            }
        )
    return rows
