"""The README and the pages of docs/howto run from top to bottom, and print the output that they show."""

from __future__ import annotations

import re

import pytest

from tests.docs.blocks import HOWTO, ROOT, run, same, visible
from tests.docs.blocks import blocks as blocks_of

RUN = [ROOT / "README.md", *sorted(HOWTO.glob("*.md"))]
HOW_TO = [page for page in RUN if page.name != "README.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs_as_written(page, tmp_path):
    """Numbers may differ: they depend on the machine's order of summation, its clock and its paths."""
    differ = [
        f"$ {step.command}\nshown:\n{step.shown}\nprinted:\n{visible(output)}"
        for step, output in run(page, tmp_path)
        if step.shown is not None and not same(step.shown, output)
    ]
    assert not differ, (
        "\n\n".join(differ)
        + f"\n\nwrite the output of today: python -m tests.docs.blocks {page.relative_to(ROOT)}"
    )


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_a_how_to_is_short_and_shows_output(page):
    assert len(page.read_text().splitlines()) <= 80
    shown = [b for b in blocks_of(page) if b.language == "console"]
    assert shown or page.stem == "README"
    for block in shown:
        assert re.search(r"^(?!\$ |    -).+", block.text, re.M), f"{page.name}: a block shows no output"


def test_the_readme_fits():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
