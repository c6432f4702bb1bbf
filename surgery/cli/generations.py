"""Generated text in the terminal, as it is generated, and dialogues."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from time import perf_counter

import click
import torch

from surgery.cli.inference.generate import Generator, Sampling, dialogue
from surgery.common.errors import SurgeryError


def tell_generated(generator: Generator, prompt: str, how: Sampling, seed: int, as_json: bool) -> None:
    """Generate and print the text that follows a prompt.

    Args:
        generator: the model.
        prompt: the prompt, `-` to read it from the standard input.
        how: how tokens are chosen.
        seed: seed of the sampling.
        as_json: print JSON when the text is complete.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = generator.prompt(text)
    torch.manual_seed(seed)
    if not as_json:
        generator.generate(ids, how, _write)
        click.echo("")
        return
    said: list[str] = []
    start = perf_counter()
    tokens = generator.generate(ids, how, said.append)
    seconds = perf_counter() - start
    click.echo(
        json.dumps({"prompt": text, "text": "".join(said), "tokens": tokens, "seconds": round(seconds, 4)})
    )


def hold_dialogue(
    generator: Generator, first: str | None, system: str | None, how: Sampling, seed: int
) -> None:
    """Answer lines of the standard input until it ends.

    Args:
        generator: the model.
        first: what the user says first, or None.
        system: system message, or None.
        how: how tokens are chosen.
        seed: seed of the sampling.
    """
    generator.chat([{"role": "user", "content": "-"}])  # a missing template is reported before a line is read
    torch.manual_seed(seed)
    if first == "-":
        raise SurgeryError("--chat reads the standard input already; leave out -")
    dialogue(generator, _lines(first), how, _write, system)


def _lines(first: str | None) -> Iterator[str]:
    if first is not None:
        yield first
    shown = sys.stdin.isatty()
    if shown:
        click.echo("Ctrl-D ends the dialogue", err=True)
    while True:
        try:
            # `input` lets the user edit the line.
            line = input("> ") if shown else sys.stdin.readline()
        except EOFError:
            click.echo("")
            return
        if not shown and not line:
            return
        if line.strip():
            yield line.strip()


def _write(text: str) -> None:
    # A text may hold escape sequences of a terminal.
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    click.echo(shown, nl=False)
    sys.stdout.flush()
