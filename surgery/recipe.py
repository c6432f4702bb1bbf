"""Recipes: the file form of a pipeline, in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import SurgeryError, nearest
from surgery.files import write_text
from surgery.pass_base import Pass
from surgery.plugins import Plugins

_KEYS = ("model", "task", "model_kwargs", "passes", "freeze_base")


@dataclass(frozen=True)
class Recipe:
    """model, task and model_kwargs as on the command line (all may be absent); passes in order."""

    passes: tuple[Pass, ...]
    model: str | None = None
    task: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    freeze_base: bool | None = None


def read_recipe(path: Path, plugins: Plugins) -> Recipe:
    """Parse a recipe. Raises SurgeryError in one line that names the place, and PassError for a wrong option."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise SurgeryError(f"recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SurgeryError(f"recipe {path} is no text file") from None
    except yaml.YAMLError as error:
        raise SurgeryError(f"recipe {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise SurgeryError(f"recipe {path} must be a mapping with the key 'passes'")
    for key in data:
        if key not in _KEYS:
            raise SurgeryError(f"recipe {path} has an unknown key {key!r}{nearest(str(key), _KEYS)}")
    listed = data.get("passes")
    if not isinstance(listed, list) or not listed:
        raise SurgeryError(f"recipe {path}: 'passes' must be a list with at least one pass")
    passes = []
    for index, item in enumerate(listed, 1):
        if not isinstance(item, dict) or not isinstance(item.get("pass"), str):
            raise SurgeryError(f"recipe {path}: pass {index} must be a mapping with a 'pass' name")
        options = {str(key).replace("-", "_"): value for key, value in item.items() if key != "pass"}
        passes.append(plugins.find_pass(item["pass"]).cls.parse(options))
    kwargs = data.get("model_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise SurgeryError(f"recipe {path}: 'model_kwargs' must be a mapping")
    return Recipe(tuple(passes), data.get("model"), data.get("task"), kwargs, data.get("freeze_base"))


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe that read_recipe reads back to the same passes."""
    data: dict[str, Any] = {}
    if recipe.model:
        data["model"] = recipe.model
    if recipe.task:
        data["task"] = recipe.task
    if recipe.model_kwargs:
        data["model_kwargs"] = dict(recipe.model_kwargs)
    if recipe.freeze_base is not None:
        data["freeze_base"] = recipe.freeze_base
    data["passes"] = _listed(recipe.passes)
    write_text(Path(path), yaml.safe_dump(data, sort_keys=False))


def _listed(passes: Sequence[Pass]) -> list[dict[str, Any]]:
    return [{"pass": p.name, **p.given_options()} for p in passes]
