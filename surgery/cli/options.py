"""Options that several commands share, and how a model is loaded from them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml

from surgery.common.errors import SurgeryError
from surgery.common.plugins import Plugins
from surgery.engine.program import Program
from surgery.store.load import load


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--task, --model-kwarg, --trust, --base, --example; the command gets a `loader(ref)` in their place."""
    base = click.option("--base", metavar="MODEL", help="Where the base of a saved directory lies now.")
    return base(loading_options(function))


def loading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same without --base."""

    @click.option("--task", help="The head to load, by transformers' task name (text-classification, …).")
    @click.option(
        "--model-kwarg",
        "model_kwarg",
        multiple=True,
        metavar="NAME=VALUE",
        help="For the model's constructor.",
    )
    @click.option(
        "--example", multiple=True, metavar="DIM=SIZE", help="Size of the example inputs, such as seq=32."
    )
    @click.option("--trust", is_flag=True, help="Read a file that can run code when it is read (.pt2).")
    @click.pass_obj
    @functools.wraps(function)
    def wrapped(
        plugins: Plugins,
        /,
        *args: Any,
        task: str | None,
        model_kwarg: tuple[str, ...],
        example: tuple[str, ...],
        trust: bool,
        base: str | None = None,
        **kwargs: Any,
    ) -> Any:
        import torch

        def loader(ref: str, recipe: Any = None) -> Program:
            given = dict(_pair(text, "--model-kwarg") for text in model_kwarg)
            sizes = dict(_pair(text, "--example") for text in example)
            for name, size in sizes.items():
                if not isinstance(size, int) or size < 1:
                    raise SurgeryError(f"--example {name}={size}: a size is a positive whole number")
            # What no file gives (a new head, a timm model) is the same in every command.
            torch.manual_seed(kwargs.get("seed") or 0)
            chosen = task or (recipe.task if recipe else None)
            merged = {**(recipe.model_kwargs if recipe else {}), **given}
            program = load(
                ref, task=chosen, model_kwargs=merged, trust=trust, base=base, example=sizes, plugins=plugins
            )
            for note in program.base.captured.notes:  # a warning to Python, which is silent here
                click.echo(f"note: {note}", err=True)
            return program

        return function(*args, plugins=plugins, loader=loader, **kwargs)

    return wrapped


def _pair(text: str, option: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SurgeryError(f"{option} {text!r}: write NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
output_option = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is at the output path.")


def with_adapters(function: Callable[..., Any]) -> Callable[..., Any]:
    """--only, --without, --weight; the command gets a `choose(program)` in their place."""

    @click.option("--only", multiple=True, metavar="ADAPTER", help="Leave out every adapter but these.")
    @click.option("--without", multiple=True, metavar="ADAPTER", help="Leave an adapter out.")
    @click.option(
        "--weight", "weights", multiple=True, metavar="ADAPTER=W", help="Scale an adapter: 1 as trained."
    )
    @functools.wraps(function)
    def wrapped(
        *args: Any, only: tuple[str, ...], without: tuple[str, ...], weights: tuple[str, ...], **kwargs: Any
    ) -> Any:
        def choose(program: Program) -> Program:
            if only:
                program = program.only(*only)
            if without:
                program = program.without(*without)
            chosen = read_weights(weights)
            return program.weighted(chosen) if chosen else program

        return function(*args, choose=choose, **kwargs)

    return wrapped


def read_weights(given: tuple[str, ...]) -> dict[str, float]:
    """`NAME=W` to a number by name."""
    chosen = dict(_pair(text, "--weight") for text in given)
    for name, weight in chosen.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise SurgeryError(f"--weight {name}={weight}: a weight is a number")
    return chosen
