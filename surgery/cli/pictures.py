"""Writes pages of programs and of differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from surgery.cli.loading import read_data
from surgery.cli.render import console
from surgery.common.errors import SurgeryError
from surgery.common.files import refuse_file, write_text
from surgery.engine.program import Program
from surgery.export.show.compare import compare
from surgery.export.show.model import model_data
from surgery.export.show.model_explorer import model_explorer
from surgery.export.show.page import page


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise SurgeryError if the file exists and may not be replaced, or is a directory."""
    if output.is_dir():
        raise SurgeryError(f"{output} is a directory; name a file, such as {output / 'model.html'}")
    refuse_file(output, overwrite, "file")


def write_view(program: Program, title: str, output: Path, form: str) -> None:
    """Write the page of a program, or its JSON for Model Explorer.

    Args:
        program: The program.
        title: Title of the page.
        output: File to write.
        form: "html" or "model-explorer".
    """
    data = model_data(program, title)
    text = page(data) if form == "html" else model_explorer(data)
    write_text(output, text)
    how = "open it in a browser" if form == "html" else f"open it with model-explorer {output}"
    console().print(f"wrote {output} ({len(text) / 1e6:.1f} MB); {how}")


def write_difference(
    a: Program,
    b: Program,
    titles: tuple[str, str],
    output: Path,
    *,
    values: bool,
    data: Sequence[Path],
    quiet: bool,
) -> None:
    """Write the page of a difference.

    Args:
        a: First program.
        b: Second program.
        titles: Titles of both.
        output: File to write.
        values: Run both programs and compare the values of their ops.
        data: Files with inputs to compare them on.
        quiet: Print nothing.
    """
    found = compare(a, b, titles, values=values, data=read_data(a, data))
    text = page(found)
    write_text(output, text)
    if quiet:
        return
    out = console()
    # A comparison that failed must not look like one without differences.
    for fact, sentence in found.facts:
        if fact == "values":
            out.print(f"values {sentence}")
    out.print(f"wrote {output} ({len(text) / 1e6:.1f} MB); open it in a browser")
