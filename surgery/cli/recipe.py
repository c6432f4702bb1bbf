"""Recipes, in YAML: passes, the file form of `surgery apply`; with training, merge and export that of `surgery run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import Field, model_validator

from surgery.common.errors import SurgeryError, nearest
from surgery.common.files import write_text
from surgery.common.options import Configured
from surgery.common.plugins import Plugins
from surgery.engine.contract.base import Pass
from surgery.engine.contract.folds import How
from surgery.engine.registry import find_pass
from surgery.train.request import Lesson

LATER = ("train", "merge", "finish", "export")
_KEYS = ("model", "task", "model_kwargs", "passes", "freeze_base", *LATER)


class Merging(Configured):
    """Adapters are folded into the base; see Program.merge."""

    kind: ClassVar[str] = "recipe's merge"

    quantized: How = Field("keep", description="what becomes of adapters on quantized weights")
    budget: float = Field(0.1, ge=0, description="the part of what they add that may be lost")


class Shipping(Configured):
    """ONNX, as `surgery export` writes it."""

    kind: ClassVar[str] = "recipe's export"

    file: str = Field(
        "model.onnx", description="name in the directory of the run; a directory's with generate"
    )
    generate: bool = False
    adapters_as_inputs: bool = False
    opset: int | None = Field(None, ge=18)
    external_data: bool | None = None
    seed: int = Field(0, description="for the fresh inputs of the parity check")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if Path(self.file).name != self.file or self.file in (".", ".."):
            raise ValueError(f"--file {self.file} is to be a name in the directory of the run, no path")
        if self.generate and self.external_data is not None:
            raise ValueError("--generate writes the weights beside the graphs; leave out --external-data")
        return self


T = TypeVar("T", bound=Configured)
R = TypeVar("R")


@dataclass(frozen=True)
class Recipe:
    """model, task and model_kwargs as on the command line (all may be absent); passes in order. What follows them:
    train, merge, finish (passes on what was trained or merged: quantize, say) and export; each may be absent."""

    passes: tuple[Pass, ...]
    model: str | None = None
    task: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    freeze_base: bool | None = None
    train: Lesson | None = None
    merge: Merging | None = None
    finish: tuple[Pass, ...] = ()
    export: Shipping | None = None

    @property
    def later(self) -> list[str]:
        """The sections that `surgery run` carries out and `surgery apply` does not."""
        return [name for name in LATER if getattr(self, name)]


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
    passes = _passes(path, data, "passes", plugins)
    if not passes:
        raise SurgeryError(f"recipe {path}: 'passes' must be a list with at least one pass")
    kwargs = data.get("model_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise SurgeryError(f"recipe {path}: 'model_kwargs' must be a mapping")
    train = data.get("train")
    if train is not None and not isinstance(train, dict):
        raise SurgeryError(f"recipe {path}: 'train' must be a mapping with an 'objective' and 'data'")
    return Recipe(
        passes,
        data.get("model"),
        data.get("task"),
        kwargs,
        data.get("freeze_base"),
        _within(path, "train", lambda: Lesson.parse(train, plugins)) if train is not None else None,
        _section(path, data, "merge", Merging, ""),
        _passes(path, data, "finish", plugins),
        _section(path, data, "export", Shipping, "file"),
    )


def _passes(path: Path, data: Mapping[str, Any], key: str, plugins: Plugins) -> tuple[Pass, ...]:
    listed = data.get(key)
    if listed is None:
        return ()
    if not isinstance(listed, list) or not listed:
        raise SurgeryError(f"recipe {path}: {key!r} must be a list with at least one pass")
    passes = []
    for index, item in enumerate(listed, 1):
        if not isinstance(item, dict) or not isinstance(item.get("pass"), str):
            raise SurgeryError(f"recipe {path}: pass {index} of {key!r} must be a mapping with a 'pass' name")
        options = {str(name).replace("-", "_"): value for name, value in item.items() if name != "pass"}
        passes.append(find_pass(plugins, item["pass"]).cls.parse(options))
    return tuple(passes)


def _section(path: Path, data: Mapping[str, Any], key: str, cls: type[T], alone: str) -> T | None:
    """A section that is a mapping of options, or true, or the one value of the option `alone`; None where left out."""
    given = data.get(key)
    if given is None or given is False:
        return None
    if given is True:
        given = {}
    if alone and isinstance(given, str):
        given = {alone: given}
    if not isinstance(given, dict):
        raise SurgeryError(f"recipe {path}: {key!r} must be a mapping of options, or true")
    options = {str(name).replace("-", "_"): value for name, value in given.items()}
    return _within(path, key, lambda: cls.parse(options))


def _within(path: Path, key: str, read: Callable[[], R]) -> R:
    try:
        return read()
    except SurgeryError as error:
        raise type(error)(f"recipe {path}, {key!r}: {error}") from None


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
    if recipe.train:
        data["train"] = recipe.train.written()
    if recipe.merge:
        data["merge"] = recipe.merge.given_options() or True
    if recipe.finish:
        data["finish"] = _listed(recipe.finish)
    if recipe.export:
        data["export"] = recipe.export.given_options() or True
    write_text(Path(path), yaml.safe_dump(data, sort_keys=False))


def _listed(passes: Sequence[Pass]) -> list[dict[str, Any]]:
    return [{"pass": p.name, **p.given_options()} for p in passes]
