"""Recipes: YAML files with the passes of `surgery apply`, or with all stages of `surgery run`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import click
import yaml
from pydantic import Field, model_validator

from surgery.capture.stored_options import check_kwargs
from surgery.cli.names import check_targets
from surgery.cli.yaml_text import Refused, parse_yaml
from surgery.common.errors import MissingExtraError, SurgeryError, nearest
from surgery.common.files import write_text
from surgery.common.options import Configured
from surgery.common.patterns import matcher
from surgery.common.plugins import Plugins
from surgery.common.readers import first_line
from surgery.engine.contract.base import Pass
from surgery.engine.contract.folds import How
from surgery.engine.registry import find_pass
from surgery.train.request import TrainingRequest

LATER = ("train", "merge", "finish", "export")
_TYPES: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
    ("model", str, "a reference, such as hf:DIR"),
    ("task", str, "the name of a task"),
    ("model_kwargs", dict, "a mapping"),
    ("input", (str, list), "a text such as 'x=float32[batch=2,3]', or a list of them"),
    ("random", bool, "true or false"),
    ("freeze_base", bool, "true or false"),
    ("train", dict, "a mapping with an 'objective' and 'data'"),
)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_KEYS = ("model", "task", "model_kwargs", "input", "random", "passes", "freeze_base", *LATER)


class Merging(Configured):
    """The merge of a recipe: options of `Program.merge`.

    Attributes:
        quantized: treatment of adapters on quantized weights.
        budget: largest share of an adapter's contribution that may be lost there.
    """

    _kind: ClassVar[str] = "recipe's merge"

    quantized: How = Field(default="keep", description="treatment of adapters on quantized weights")
    budget: float = Field(
        default=0.1, ge=0, description="largest share of their contribution that may be lost"
    )


class Shipping(Configured):
    """The ONNX export of a recipe: options of `surgery export`.

    Attributes:
        file: name of the ONNX file, or of the directory with `generate`, in the directory of the run.
        generate: export a language model for generation.
        adapters_as_inputs: make LoRA weights optional inputs.
        opset: ONNX opset, None for the exporter's default.
        external_data: store weights in a separate file, None for the default.
        seed: seed of the random inputs of the parity check.
        cpu: processors that int8 products must be correct on, None for those that the passes name.
        tolerance: how much rounded activations may change beyond twice the program's own, None for the default.
    """

    _kind: ClassVar[str] = "recipe's export"

    file: str = Field(
        default="model.onnx",
        description="file name in the directory of the run; with generate, the name of a directory",
    )
    generate: bool = False
    adapters_as_inputs: bool = False
    opset: int | None = Field(default=None, ge=18)
    external_data: bool | None = None
    seed: int = Field(default=0, description="seed of the random inputs of the parity check")
    cpu: Literal["any", "vnni"] | None = None
    tolerance: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if Path(self.file).name != self.file or self.file.startswith(".") or not self.file.isprintable():
            raise ValueError(
                f"--file {self.file} must be a name in the directory of the run; remove the directory part"
            )
        if self.generate and self.external_data is not None:
            raise ValueError("--generate always stores weights in separate files; remove --external-data")
        return self


T = TypeVar("T", bound=Configured)
R = TypeVar("R")


@dataclass(frozen=True)
class Recipe:
    """The contents of a recipe. Every part except the passes may be absent.

    Attributes:
        passes: passes in order.
        model: model reference.
        task: task name for transformers.
        model_kwargs: arguments of the model's constructor.
        freeze_base: freeze the base first; None: if a pass needs it.
        train: training after the passes.
        merge: merge after the training.
        finish: passes on the trained or merged model, such as quantize.
        export: ONNX export of the result.
        random: random weights instead of pretrained ones.
        input: texts that describe the example inputs of a `py:` model.
    """

    passes: tuple[Pass, ...]
    model: str | None = None
    task: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    freeze_base: bool | None = None
    train: TrainingRequest | None = None
    merge: Merging | None = None
    finish: tuple[Pass, ...] = ()
    export: Shipping | None = None
    random: bool = False
    input: tuple[str, ...] = ()

    @property
    def later(self) -> list[str]:
        """Sections that only `surgery run` carries out, not `surgery apply`."""
        return [name for name in LATER if getattr(self, name)]


def read_recipe(path: Path, plugins: Plugins, allowed: Collection[str] = ()) -> Recipe:
    """Parse a recipe file.

    Args:
        path: the file. It may come from elsewhere: nothing in it runs code that the user has not named.
        plugins: plugin manager with the passes and objectives.
        allowed: code that the recipe may name, such as `py:package.module:callable` or `module:function`.

    Raises:
        SurgeryError: the file cannot be read or a section is wrong; the message names the section.
        PassError: a pass is unknown or has a wrong option.
    """
    data = _read(Path(path))
    if not isinstance(data, dict):
        raise SurgeryError(f"recipe {path} must be a mapping with the key 'passes'")
    for key in data:
        if key not in _KEYS:
            raise SurgeryError(
                f"recipe {path} has an unknown key {str(key)[:100]!r}{nearest(str(key)[:100], _KEYS)}"
            )
    for key, kind, what in _TYPES:
        if data.get(key) is not None and not isinstance(data[key], kind):
            raise SurgeryError(f"recipe {path}: {key!r} must be {what}")
    for key in ("passes", "finish", "train"):
        for text in _texts(data.get(key)):
            _refuse_hidden_code(path, key, text, allowed)
            _refuse_slow_patterns(path, key, text)
    passes = _passes(path, data, "passes", plugins)
    if not passes:
        raise SurgeryError(f"recipe {path}: 'passes' must be a list with at least one pass")
    train = data.get("train")
    return Recipe(
        passes,
        data.get("model"),
        data.get("task"),
        data.get("model_kwargs") or {},
        data.get("freeze_base"),
        _within(path, "train", lambda: TrainingRequest.parse(train, plugins)) if train is not None else None,
        _section(path, data, "merge", Merging, ""),
        _passes(path, data, "finish", plugins),
        _section(path, data, "export", Shipping, "file"),
        bool(data.get("random")),
        _inputs(path, data.get("input")),
    )


def _inputs(path: Path, given: str | list[Any] | None) -> tuple[str, ...]:
    """The texts of example inputs. Raises SurgeryError if one is no text."""
    listed = [given] if isinstance(given, str) else given or []
    if not all(isinstance(text, str) for text in listed):
        raise SurgeryError(
            f"recipe {path}: 'input' must be a text such as 'x=float32[batch=2,3]', or a list of them"
        )
    return tuple(listed)


def _read(path: Path) -> Any:
    """The YAML value in a recipe file. Raises SurgeryError if it cannot be read."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SurgeryError(f"recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SurgeryError(f"recipe {path} is not a text file") from None
    except Refused as error:
        raise SurgeryError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SurgeryError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a section of a recipe."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def _refuse_hidden_code(path: Path, key: str, text: str, allowed: Collection[str]) -> None:
    """Refuse an option that names code: a `py:` model, or the `module:function` of an objective.

    Args:
        path: recipe file, for the message.
        key: name of the section.
        text: an option in it.
        allowed: code that the user has named.

    Raises:
        SurgeryError: the text names other code.
    """
    # The options of a nested objective are one text: classification,label=stars.
    for part in text.split(","):
        named = part.rpartition("=")[2].strip()
        is_code = named.startswith("py:") or (
            # Targets of passes, such as path:encoder, look alike, and no pass reads a function.
            key == "train" and _FUNCTION.fullmatch(named) and not named.startswith(("hf:", "timm:"))
        )
        if is_code and named not in allowed:
            raise SurgeryError(
                f"recipe {path}, {key!r}: it names code, {named[:200]}; if you trust it, name it again: "
                f"--allow-code {named[:200]}"
            )


def _refuse_slow_patterns(path: Path, key: str, text: str) -> None:
    """Refuse a target with a regular expression that could take very long. Raises SurgeryError."""
    for part in text.split(","):
        prefix, found, pattern = part.partition("re:")
        # Penalties are written l1=STRENGTH@TARGET.
        if found and not prefix.rpartition("@")[2].strip(" !"):
            try:
                matcher(pattern.strip())
            except ValueError as error:
                raise SurgeryError(
                    f"recipe {path}, {key!r}: the pattern of the target {part[:100]!r} is not read from a recipe: "
                    f"{error}"
                ) from None


def _options(path: Path, key: str, given: Mapping[Any, Any], without: str = "") -> dict[str, Any]:
    """Options with `_` for `-` in their names. Raises SurgeryError if two names are then the same."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        plain = str(name).replace("-", "_")
        if plain in options:
            raise SurgeryError(f"recipe {path}, {key!r}: the option {plain!r} is given twice; remove one")
        if name != without:
            options[plain] = value
    return options


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
        options = _options(path, key, item, without="pass")
        passes.append(find_pass(plugins, item["pass"]).cls.parse(options))
    return tuple(passes)


def _section(path: Path, data: Mapping[str, Any], key: str, cls: type[T], alone: str) -> T | None:
    """A section of a recipe as an instance of `cls`, or None if it is absent or false.

    Args:
        path: recipe file, for messages.
        data: the recipe.
        key: name of the section.
        cls: class of the section.
        alone: option that a section consisting of a single text sets, or "".
    """
    given = data.get(key)
    if given is None or given is False:
        return None
    if given is True:
        given = {}
    if alone and isinstance(given, str):
        given = {alone: given}
    if not isinstance(given, dict):
        raise SurgeryError(f"recipe {path}: {key!r} must be a mapping of options, or true")
    options = _options(path, key, given)
    return _within(path, key, lambda: cls.parse(options))


def _within(path: Path, key: str, read: Callable[[], R]) -> R:
    """Call `read` and add file and section to the message of a SurgeryError."""
    try:
        return read()
    except MissingExtraError:
        raise
    except SurgeryError as error:
        raise type(error)(f"recipe {path}, {key!r}: {error}") from None
    except Exception as error:  # the boundary: whatever else a recipe from elsewhere holds
        raise SurgeryError(
            f"recipe {path}, {key!r}: cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe. `read_recipe` reads an equal one from the file. Raises SurgeryError if it cannot be written."""
    data: dict[str, Any] = {}
    if recipe.model:
        data["model"] = recipe.model
    if recipe.task:
        data["task"] = recipe.task
    if recipe.model_kwargs:
        data["model_kwargs"] = dict(recipe.model_kwargs)
    if recipe.input:
        data["input"] = list(recipe.input)
    if recipe.random:
        data["random"] = True
    if recipe.freeze_base is not None:
        data["freeze_base"] = recipe.freeze_base
    data["passes"] = _listed(recipe.passes)
    if recipe.train:
        data["train"] = recipe.train.written()
    if recipe.merge:
        data["merge"] = recipe.merge.options(given_only=True) or True
    if recipe.finish:
        data["finish"] = _listed(recipe.finish)
    if recipe.export:
        data["export"] = recipe.export.options(given_only=True) or True
    write_text(Path(path), yaml.safe_dump(data, sort_keys=False))


def _listed(passes: Sequence[Pass]) -> list[dict[str, Any]]:
    return [{"pass": p.name, **p.options(given_only=True)} for p in passes]


def wanted_recipe(
    ctx: click.Context, model: str | None, recipe: Path | None, freeze_base: bool | None, plugins: Plugins
) -> Recipe:
    """Model and passes from the command line and a recipe file. The command line wins.

    Args:
        ctx: context of the command, with the groups of its --pass options.
        model: MODEL of the command line, or None.
        recipe: recipe file, or None.
        freeze_base: value of --freeze-base, None if it is not given.
        plugins: plugin manager.

    Raises:
        SurgeryError: the recipe is wrong, or its model is code that the command line does not name.
        click.UsageError: no model or no pass is given.
    """
    given = [find_pass(plugins, name).cls.parse(options) for name, options in ctx.meta.get("groups", [])]
    read = read_recipe(recipe, plugins) if recipe is not None else Recipe(())
    if read.later:
        ignored = ", ".join(read.later)
        click.echo(
            f"note: {ignored} of {recipe} {'are' if len(read.later) > 1 else 'is'} ignored here; use surgery run",
            err=True,
        )
    reference = model or read.model
    if reference is None:
        raise click.UsageError("no MODEL is given, on the command line or in a recipe; add MODEL")
    refuse_code(model, reference, recipe, read.model_kwargs)
    passes = (*read.passes, *given)
    if not passes:
        raise click.UsageError("no pass was given; add --pass NAME or --recipe FILE (see `surgery passes`)")
    chosen = freeze_base if freeze_base is not None else read.freeze_base
    check_targets(passes, reference, plugins)
    is_random = read.random or bool(ctx.params.get("random"))
    inputs = tuple(ctx.params.get("inputs") or ()) or read.input
    return Recipe(passes, reference, read.task, read.model_kwargs, chosen, random=is_random, input=inputs)


def refuse_code(
    model: str | None, reference: str, recipe: Path | None, model_kwargs: Mapping[str, Any]
) -> None:
    """Refuse to run code that only a recipe names or enables.

    Args:
        model: MODEL of the command line, or None.
        reference: model reference to load, from the command line or the recipe.
        recipe: recipe file, for the message.
        model_kwargs: arguments of the model's constructor that the recipe names.

    Raises:
        SurgeryError: the reference is a `py:` reference and comes from the recipe, or an argument can run code or is
            out of range.
    """
    if model is None and reference.startswith("py:"):
        raise SurgeryError(
            f"recipe {recipe} names code as its model, {reference}; to run that code, pass it again as MODEL"
        )
    check_kwargs(model_kwargs, reference, f"recipe {recipe}, 'model_kwargs'", SurgeryError)
