"""Classes with options, such as passes and objectives: frozen pydantic models whose fields are the options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from surgery.common.errors import SurgeryError, nearest
from surgery.common.guard import guard

_LONGEST = 1000  # characters of an error that repeats an option


class Configured(BaseModel):
    """Base of classes with options. Unknown options are refused; instances are immutable and hashable.

    Attributes:
        name: name on the command line and in recipes.
        example: command lines that use it, one a line, for its help and its reference page. "" for one that is made of
            the name and the required options.
        _kind: noun for the class in messages, such as "pass".
        _failure: exception for a wrong option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    _kind: ClassVar[str] = ""
    _failure: ClassVar[type[SurgeryError]] = SurgeryError
    name: ClassVar[str] = ""
    example: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **given: Any) -> None:
        super().__pydantic_init_subclass__(**given)
        guard(cls, cls._kind)

    def options(self, given_only: bool = False) -> dict[str, Any]:
        """The options by name, JSON-able.

        A journal stores all of them, since a later version may have other defaults.

        Args:
            given_only: only options that differ from their defaults, as a person writes them in a recipe.
        """
        return self.model_dump(mode="json", exclude_defaults=given_only, by_alias=True)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """Make an instance from untrusted options. Raises `_failure` for an unknown or wrong option."""
        title = f"{cls._kind} {cls.name!r}" if cls.name else cls._kind
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            problem = error.errors()[0]
            # A validator of the whole class, which checks several options together, has no location.
            if not problem["loc"]:
                raise cls._failure(f"{title}: {problem['msg'].removeprefix('Value error, ')}") from None
            field = ".".join(part for part in problem["loc"] if isinstance(part, str))[:100]
            flag = "--" + "".join(c if c.isprintable() else "?" for c in field.replace("_", "-"))
            if problem["type"] == "extra_forbidden":
                known = [written(n, f) for n, f in cls.model_fields.items()]
                hint = nearest(field, known) or f"; it has {', '.join(sorted(known))}"
                raise cls._failure(f"{title} has no option {flag}{hint}") from None
            shown = problem.get("input")
            if field == "as":
                raise cls._failure(
                    f"{title}: --as {_short(shown)} is not a valid name; use letters, digits, - and _"
                ) from None
            said = problem["msg"].removeprefix("Value error, ")
            said = said if said != problem["msg"] else said.lower()
            raise cls._failure(f"{title}: {flag} is {_short(shown)}: {said}") from None
        except SurgeryError as error:
            if len(str(error)) <= _LONGEST:
                raise
            raise type(error)(f"{str(error)[:_LONGEST]}…") from None
        except Exception as error:  # the boundary: a validator met a value that it does not expect
            said = next(iter(str(error).splitlines()), "")[:200]
            raise cls._failure(
                f"{title}: its options cannot be read ({type(error).__name__}: {said}); check their values"
            ) from error


def written(name: str, info: FieldInfo) -> str:
    """The name of an option as users write it: its alias, or that of the field."""
    return info.serialization_alias or name


def _short(value: Any) -> str:
    """The representation of a value, at most 200 characters of it."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:199]}…"


def describe_options(configured: type[Configured]) -> list[dict[str, Any]]:
    """The options of a class: a row with option, type, default, required and description for each field."""
    rows = []
    for name, info in configured.model_fields.items():
        annotation = info.annotation
        shown = getattr(annotation, "__name__", None) if not hasattr(annotation, "__args__") else None
        rows.append(
            {
                "option": "--" + written(name, info).replace("_", "-"),
                "type": shown or str(annotation).replace("typing.", "").replace(" | None", ""),
                "default": None if info.is_required() else info.default,
                "required": info.is_required(),
                "description": info.description or "",
            }
        )
    return rows
