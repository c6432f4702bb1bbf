"""The options of `surgery train` that come from the fields of `surgery.train.options.Settings`.

They are read from the source of that class. Its import needs pydantic, which alone takes twice the time of the rest of
`surgery train --help`. tests/cli/test_startup.py compares the result with the class.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import click


@dataclass(frozen=True)
class Setting:
    """A field of Settings.

    Attributes:
        name: name of the field.
        default: default value.
        description: description, without a capital or a full stop.
        choices: allowed texts; empty if any text is allowed.
        is_flag: the field is a bool.
    """

    name: str
    default: Any
    description: str
    choices: tuple[str, ...] = ()
    is_flag: bool = False

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def read_settings() -> list[Setting]:
    """The fields of Settings in order, each declared as `name: type = Field(default=…, description="…")`."""
    spec = find_spec("surgery.train.options")
    source: str = spec.loader.get_source(spec.name)  # type: ignore[union-attr]
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    (settings,) = (node for node in classes if node.name == "Settings")
    found = []
    for node in settings.body:
        # Other annotated names of the class are class variables, not fields.
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
            continue
        given = {keyword.arg: keyword.value for keyword in node.value.keywords}
        annotation = ast.unparse(node.annotation)
        literal = isinstance(node.annotation, ast.Subscript) and annotation.startswith("Literal[")
        found.append(
            Setting(
                ast.unparse(node.target),
                ast.literal_eval(given["default"]),
                ast.literal_eval(given["description"]),
                ast.literal_eval(node.annotation.slice) if literal else (),  # type: ignore[attr-defined]
                annotation == "bool",
            )
        )
    return found


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds an option for each field of Settings.

    The command gets the values by field name. An option that is not given is None, False or (). Values stay texts for
    Settings to validate, except the seed, which also seeds the loading of the model.
    """
    for setting in reversed(read_settings()):
        several = setting.default == ()
        kind: Any = (
            click.Choice(setting.choices) if setting.choices else int if setting.name == "seed" else str
        )
        about = setting.description[0].upper() + setting.description[1:]
        shown = f" [default: {setting.default}]" if setting.default not in (None, (), False) else ""
        function = click.option(
            setting.option,
            setting.name,
            **({"is_flag": True} if setting.is_flag else {"type": kind, "multiple": several}),
            metavar=None if setting.choices or setting.is_flag else "TEXT" if several else "N",
            help=f"{about}.{shown}",
        )(function)
    return function
