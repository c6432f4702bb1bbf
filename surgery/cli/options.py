"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.completion import complete_adapters
from surgery.cli.plugins import plugins_of

if TYPE_CHECKING:
    from surgery.engine.program import Program


# Key of the device in the context of a command: a torch.device, or None if the user chose none.
DEVICE = "surgery.device"


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds --base to `loading_options`."""
    base = click.option(
        "--base", metavar="MODEL", help="Base model of a saved directory, if it has moved since."
    )
    return base(loading_options(function))


def loading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds --task, --model-kwarg, --part, --example, --input, --random, --trust and --device.

    The command gets two keyword arguments instead: `plugins`, the plugin manager, and `loader(ref, recipe=None)`,
    which loads a program with these options.
    """

    @click.option(
        "--task",
        help="Head to load, by transformers' task name (text-classification, …; sentence-similarity for a "
        "sentence-transformers model).",
    )
    @click.option(
        "--model-kwarg",
        "model_kwarg",
        multiple=True,
        metavar="NAME=VALUE",
        help="Argument of the model's constructor. In diff and verify, A:NAME=VALUE is for A alone, B:… for B.",
    )
    @click.option(
        "--part", metavar="NAME", help="Model of a diffusers: pipeline, such as unet or text_encoder."
    )
    @click.option(
        "--example", multiple=True, metavar="DIM=SIZE", help="Size of the example inputs, such as seq=32."
    )
    @click.option(
        "--input",
        "inputs",
        multiple=True,
        metavar="TEXT",
        help="Example input of a py: model, such as 'x=float32[batch=2,3,h=224,w=224]'; named dimensions are dynamic.",
    )
    @click.option(
        "--random", is_flag=True, help="Random weights instead of pretrained ones (hf:, timm:, diffusers:)."
    )
    @click.option(
        "--device",
        metavar="DEVICE",
        help="Device to compute on: cpu, cuda, cuda:1, mps (default: cpu; in training a GPU, if there is one).",
    )
    @click.option("--trust", is_flag=True, help="Allow files that can run code when they are read (.pt2).")
    @click.pass_context
    @functools.wraps(function)
    def wrapped(
        ctx: click.Context,
        /,
        *args: Any,
        task: str | None,
        part: str | None,
        model_kwarg: tuple[str, ...],
        example: tuple[str, ...],
        inputs: tuple[str, ...],
        random: bool,
        trust: bool,
        device: str | None,
        base: str | None = None,
        **kwargs: Any,
    ) -> Any:
        from surgery.capture.devices import find_device
        from surgery.cli.loading import make_loader

        plugins = plugins_of(ctx)
        # Checked first: a device that is absent is reported before anything is loaded.
        chosen = ctx.meta[DEVICE] = None if device is None else find_device(device)
        loader = make_loader(
            plugins,
            task=task,
            model_kwargs=(*model_kwarg, *([f"part={part}"] if part else ())),
            examples=example,
            trust=trust,
            base=base,
            seed=kwargs.get("seed") or 0,
            is_random=random,
            inputs=inputs,
            device=chosen,
        )
        return function(*args, plugins=plugins, loader=loader, **kwargs)

    return wrapped


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
output_option = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the contents of the output path.")


def _data_option(text: str) -> Callable[..., Any]:
    """The option --data of a command, with its help text."""
    path: Any = click.Path(path_type=Path)
    return click.option("--data", multiple=True, type=path, metavar="FILE", help=text)


data_option = _data_option(
    "Inputs by name (.safetensors, .npz), or rows of texts or images (.csv, .jsonl, a directory), for passes that "
    "measure activations; may be repeated."
)
compared_option = _data_option(
    "Inputs to compare values on: by name (.safetensors, .npz), or rows of texts or images (.csv, .jsonl, a "
    "directory); may be repeated (default: the example inputs)."
)
judged_option = _data_option(
    "Data on which rounded activations are judged: rows of texts or images (.csv, .jsonl, a directory), or inputs "
    "by name (.safetensors, .npz); may be repeated (default: random inputs)."
)


def check_trackers(ctx: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Callback of --track: a tracker that is unknown or absent is reported before a model is loaded."""
    if names and not ctx.resilient_parsing:
        from surgery.train.tracking import check_tracker

        for name in names:
            check_tracker(name)
    return names


def track_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds --track and --tensorboard."""
    track = click.option(
        "--track",
        multiple=True,
        callback=check_trackers,
        metavar="NAME",
        help="Also log to an experiment tracker: tensorboard, mlflow, trackio or wandb; may be repeated.",
    )
    same = click.option("--tensorboard", is_flag=True, help="The same as --track tensorboard.")
    return track(same(function))


def with_adapters(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds --only, --without and --weight.

    The command gets the keyword argument `choose(program)` instead, which returns the program with these adapters.
    """

    @click.option(
        "--only",
        multiple=True,
        metavar="ADAPTER",
        shell_complete=complete_adapters,
        help="Disable every adapter except this one.",
    )
    @click.option(
        "--without",
        multiple=True,
        metavar="ADAPTER",
        shell_complete=complete_adapters,
        help="Disable an adapter.",
    )
    @click.option(
        "--weight",
        "weights",
        multiple=True,
        metavar="ADAPTER=W",
        shell_complete=complete_adapters,
        help="Scale an adapter; 1 is its trained strength.",
    )
    @functools.wraps(function)
    def wrapped(
        *args: Any, only: tuple[str, ...], without: tuple[str, ...], weights: tuple[str, ...], **kwargs: Any
    ) -> Any:
        def choose(program: Program) -> Program:
            from surgery.cli.loading import read_weights

            if only:
                program = program.only(*only)
            if without:
                program = program.without(*without)
            chosen = read_weights(weights)
            return program.weighted(chosen) if chosen else program

        named = [*only, *without, *(text.partition("=")[0] for text in weights)]
        if named:
            from surgery.cli.names import check_adapters

            check_adapters(str(kwargs.get("directory") or kwargs.get("model") or ""), named)
        return function(*args, choose=choose, **kwargs)

    return wrapped


def folding_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds --depth, --role and --all. The command gets the keyword argument `folding`."""

    @click.option(
        "--depth", type=click.IntRange(min=0), help="Number of module levels to show (default: all)."
    )
    @click.option(
        "--role", default="", metavar="GLOB", help='Show only sites with these roles, such as "attn.*".'
    )
    @click.option("--all", "unfolded", is_flag=True, help="List every block instead of folding equal ones.")
    @functools.wraps(function)
    def wrapped(*args: Any, depth: int | None, role: str, unfolded: bool, **kwargs: Any) -> Any:
        from surgery.common.folding import Folding

        return function(*args, folding=Folding(depth, role, unfolded), **kwargs)

    return wrapped
