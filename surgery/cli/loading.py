"""Reads values of command-line options: models, input tensors, and weights of adapters."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from surgery.capture import LoadedModel, LoadOptions
from surgery.capture.devices import on_device
from surgery.capture.hf_config import SENTENCE
from surgery.capture.reference import load_model
from surgery.capture.sentence.layout import is_sentence_directory
from surgery.cli.yaml_text import Refused, parse_yaml
from surgery.common.errors import SurgeryError, nearest
from surgery.common.plugins import Plugins
from surgery.common.readers import first_line
from surgery.engine.probe import InputSet
from surgery.engine.program import Program
from surgery.store.load import load

if TYPE_CHECKING:
    from surgery.cli.recipe import Recipe


Loading = Callable[..., Program]
# (reference, task, arguments of the constructor) -> (task, arguments).
Choose = Callable[[str, str | None, dict[str, Any]], tuple[str | None, dict[str, Any]]]


def make_loader(
    plugins: Plugins,
    *,
    task: str | None,
    model_kwargs: Sequence[str],
    examples: Sequence[str],
    trust: bool,
    base: str | None,
    seed: int,
    is_random: bool = False,
    inputs: Sequence[str] = (),
    device: torch.device | None = None,
) -> Loader:
    """A function `loader(ref, recipe=None, choose=None, dtype=None)` that loads a program with a command's options.

    Args:
        plugins: plugin manager of the program.
        task: task name for transformers; a recipe's task is used if this is None.
        model_kwargs: NAME=VALUE texts, arguments of the model's constructor. They override those of a recipe.
            A:NAME=VALUE and B:NAME=VALUE are for one model of a command with two.
        examples: DIM=SIZE texts, sizes of the example inputs.
        trust: allow files that can run code when they are read.
        base: reference of the base of a saved directory.
        seed: seed of weights that no file contains, such as a new head.
        is_random: random weights instead of pretrained ones; a recipe can ask for them too.
        inputs: texts that describe example inputs. They override those of a recipe.
        device: device to put the program on; None for the CPU.

    Returns:
        The loader. `choose` may replace the task and the arguments of the constructor; `dtype` is the dtype to load the
        model in; `random` replaces the option and the recipe; `side` is "A" or "B" in a command with two models. The
        loader raises SurgeryError for a wrong option or a model that cannot be loaded.
    """

    def loader(
        ref: str,
        recipe: Recipe | None = None,
        choose: Choose | None = None,
        dtype: str | None = None,
        random: bool | None = None,
        side: str | None = None,
    ) -> Program:
        given, sizes = _options(_of_side(model_kwargs, side, ref), examples, seed)
        chosen = task or (recipe.task if recipe else None)
        merged = {**(recipe.model_kwargs if recipe else {}), **given}
        # A saved directory has its weights, also where another model of the command is random.
        wanted = (is_random or bool(recipe and recipe.random)) if random is None else random
        if choose is not None:
            chosen, merged = choose(ref, chosen, merged)
        program = load(
            ref,
            task=chosen,
            model_kwargs=merged,
            trust=trust,
            base=base,
            example=sizes,
            plugins=plugins,
            dtype=dtype,
            random=wanted and not Path(ref).is_dir(),
            input=() if Path(ref).is_dir() else inputs or (recipe.input if recipe else ()),
            device=device,
        )
        _tell_commit(program.base.loaded)
        # The library gives these notes as Python warnings, which the command line silences.
        for note in program.base.notes:
            click.echo(f"note: {note}", err=True)
        return program

    def module(ref: str) -> LoadedModel:
        given, sizes = _options(_of_side(model_kwargs, None, ref), examples, seed)
        # A directory of sentence-transformers has its own way to one output.
        is_sentence = is_sentence_directory(Path(ref.removeprefix("hf:")))
        chosen = task or (SENTENCE if is_sentence else None)
        options = LoadOptions(task=chosen, model_kwargs=given, trust=trust, example=sizes, random=is_random)
        loaded = load_model(ref, options, plugins)
        _tell_commit(loaded)
        if device is None:
            return loaded
        loaded.module.to(device)
        return replace(
            loaded, args=on_device(loaded.args, device), kwargs=on_device(dict(loaded.kwargs), device)
        )

    return Loader(loader, module)


@dataclass(frozen=True)
class Loader:
    """Loads models with the options of a command.

    Attributes:
        program: function that loads a program; calling the loader calls it.
        module: function that loads a model of a library without a capture: the module that its library gives.
    """

    program: Callable[..., Program]
    module: Callable[[str], LoadedModel]

    def __call__(self, *args: Any, **kwargs: Any) -> Program:
        return self.program(*args, **kwargs)


def _tell_commit(loaded: LoadedModel) -> None:
    """Print the commit that the weights were fetched at, if they came from the hub."""
    if loaded.commit:
        click.echo(f"weights: {loaded.repo} at commit {loaded.commit[:12]}", err=True)


def load_sides(loader: Loading, a: str, b: str) -> tuple[Loading, Loading]:
    """The loaders of A and B in a command with two models, of which one may be a saved directory.

    Two saved directories have no side: arguments of the constructor are refused for them, as for one.
    """
    if Path(a).is_dir() and Path(b).is_dir():
        return loader, loader
    return functools.partial(loader, side="A"), functools.partial(loader, side="B")


def _of_side(texts: Sequence[str], side: str | None, ref: str) -> list[str]:
    """The arguments of the constructor that are for one model.

    Args:
        texts: NAME=VALUE for every model that is not a saved directory, A:NAME=VALUE and B:NAME=VALUE for one side.
        side: "A" or "B"; None in a command with one model, and for two saved directories.
        ref: reference of the model.

    Raises:
        SurgeryError: a text is for a side, and there are none.
    """
    chosen = []
    for text in texts:
        named = text.partition(":")[0] if text[:2] in ("A:", "B:") else None
        if named and side is None:
            raise SurgeryError(
                f"--model-kwarg {text}: {named}: is for diff and verify, and for no saved directory; leave it out"
            )
        if named == side and named is not None:
            chosen.append(text[2:])
        elif named is None and not (side is not None and Path(ref).is_dir()):
            chosen.append(text)
    return chosen


def _options(
    model_kwargs: Sequence[str], examples: Sequence[str], seed: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """The arguments of the constructor and the sizes of the example inputs. Seeds torch."""
    given = dict(_pair(text, "--model-kwarg") for text in model_kwargs)
    sizes = dict(_pair(text, "--example") for text in examples)
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise SurgeryError(f"--example {name}={size}: the size must be a positive integer")
    # Weights that no file contains (a new head, a timm model) must be the same in every command.
    torch.manual_seed(seed)
    return given, sizes


def read_data(program: Program, files: Sequence[Path]) -> list[InputSet]:
    """Input sets: one from each file of named tensors, or batches of the rows of a table of texts or images.

    The files (.safetensors, .npz; .csv, .jsonl, … or a directory) cannot contain code.

    Raises:
        SurgeryError: the program takes positional inputs, a file cannot be read, or its names do not match the inputs.
    """
    from surgery.train.input_sets import holds_rows, input_sets

    if files and all(holds_rows(path) for path in files):
        return input_sets(program, files)
    args, kwargs = program.example_inputs
    if files and args:
        raise SurgeryError(
            "--data gives inputs by name, but this model takes positional inputs; "
            "use apply(…, data=[(args, kwargs)]) from Python"
        )
    sets: list[InputSet] = []
    for path in files:
        found = _read_tensors(path)
        for name in found:
            if name not in kwargs:
                raise SurgeryError(f"{path}: the model has no input {name!r}{nearest(name, kwargs)}")
        missing = next((name for name in kwargs if name not in found), None)
        if missing:
            raise SurgeryError(f"{path} lacks the input {missing!r}; it needs {', '.join(kwargs)}")
        # The example inputs have the dtypes, and are on the device of the program.
        sets.append(((), {name: found[name].to(example) for name, example in kwargs.items()}))
    return sets


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SurgeryError(f"--data {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            return _read_npz(path)
    except Exception as error:
        raise SurgeryError(f"--data {path} cannot be read: {first_line(error)}") from None
    raise SurgeryError(
        f"--data {path}: give a .safetensors or .npz file of tensors by input name, or a "
        "table of texts (.csv, .jsonl, …)"
    )


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file. Raises ValueError if it expands to much more than its size."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    allowed = 20 * path.stat().st_size + 200_000_000
    if size > allowed:
        raise ValueError(f"it expands to {size / 1e6:,.0f} MB, over {allowed / 1e6:,.0f} MB for its size")
    with numpy.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def read_weights(given: Sequence[str]) -> dict[str, float]:
    """Adapter name -> weight, from NAME=W texts. Raises SurgeryError for a weight that is not a number."""
    chosen = dict(_pair(text, "--weight") for text in given)
    for name, weight in chosen.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise SurgeryError(f"--weight {name}={weight}: the weight must be a number")
    return chosen


def _pair(text: str, option: str) -> tuple[str, Any]:
    """NAME=VALUE as a name and a YAML value."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SurgeryError(f"{option} {text!r}: write NAME=VALUE")
    try:
        return name, parse_yaml(value)
    except Refused as error:
        raise SurgeryError(f"{option} {name}: the value cannot be read: {error}") from None
    except yaml.YAMLError:
        return name, value
