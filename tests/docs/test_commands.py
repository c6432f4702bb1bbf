"""Every command line of surgery in the README and in docs/ is one that today's command line accepts."""

from __future__ import annotations

import shlex

import click
import pytest

from surgery.cli import cli
from surgery.common.errors import SurgeryError
from tests.docs.blocks import ROOT, commands, pages
from tests.docs.blocks import blocks as blocks_of

LINES = sorted(
    {
        (line, str(page.relative_to(ROOT)))
        for page in pages()
        for block in blocks_of(page)
        for line in commands(block)
    }
)


@pytest.mark.parametrize(("line", "page"), LINES, ids=lambda value: value[:60])
def test_a_command_parses(line, page):
    """Options exist and fit together; files of the line need not be there."""
    words = [word for word in shlex.split(line, comments=True) if word != "…"]
    end = min((words.index(sign) for sign in ("|", ">") if sign in words), default=len(words))
    words = words[1:end]
    context = cli.make_context("surgery", list(words))
    name, command, rest = cli.resolve_command(context, list(words))
    assert command is not None
    try:
        command.make_context(name, rest, parent=context)
    except click.exceptions.Exit as done:  # --schema prints and ends
        if done.exit_code:
            raise
    except (click.BadParameter, SurgeryError) as error:
        if "does not exist" not in str(error) and "no such file" not in str(error):
            raise


def test_there_are_commands():
    assert len(LINES) > 50
    assert {page for _, page in LINES} >= {"README.md", "docs/tutorial.md", "docs/howto/recipe.md"}
