"""Command for authors of plugins: new-plugin."""

from __future__ import annotations

from pathlib import Path

import click

KINDS = ("pass", "weight-op", "objective", "loader", "lowering", "command")


@click.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), default="pass", show_default=True, help="Kind of plugin.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Directory to write (default: NAME here)."
)
def new_plugin(name: str, kind: str, output: Path | None) -> None:
    """Write a plugin package: pyproject, README, code, tests with the conformance kit, a CI file.

    NAME is the name of the distribution, such as torch-surgery-gate. The tests pass as they are written; put your own
    code in place of the example.
    """
    from surgery.cli.scaffold import write_plugin

    folder = output or Path(name)
    made = write_plugin(name, kind, folder)
    click.echo(f"wrote {len(made)} files into {folder}")
    click.echo(f"next: pip install -e '{folder}[test]' && python -m pytest {folder}")
