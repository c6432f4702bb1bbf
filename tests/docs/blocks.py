"""Code blocks of the README and of docs/: read, checked, run as a reader would type them, and their output written.

A page is run from top to bottom in one directory and one shell. ```console blocks hold commands after "$ " and their
output; ```bash blocks hold commands; ```python blocks are programs; a block with title="FILE" is written to that file.

    python -m tests.docs.blocks docs/howto/recipe.md    runs a page and writes the output of today into it
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOWTO = ROOT / "docs" / "howto"
_FENCE = re.compile(r"^```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
# Lines that differ from run to run in more than their numbers: progress bars, warnings of other libraries.
_NOISE = re.compile(r"━|\d+%\||it/s|Warning:|^\s*warnings\.warn|^Loading weights")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: the page, relative to the repository.
        language: first word after the fence.
        info: the rest of that line, such as title="net.py".
        text: the lines between the fences.
    """

    page: str
    language: str
    info: str
    text: str

    @property
    def title(self) -> str | None:
        """The file that the block is, if it names one."""
        found = re.search(r'title="([^"]+)"', self.info)
        return found and found[1]


@dataclass(frozen=True)
class Step:
    """One command of a page, with the output that the page shows, or None if it shows none."""

    command: str
    shown: str | None = None


def pages() -> list[Path]:
    """The README and every page of docs/ that a person writes."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(HOWTO.glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    where = str(page.relative_to(ROOT))
    return [
        Block(where, m["language"], m["info"].strip(), m["text"]) for m in _FENCE.finditer(page.read_text())
    ]


def python_block(page: str, marker: str) -> str:
    """The one ```python block of a page that contains a text."""
    (found,) = (b.text for b in blocks(ROOT / page) if b.language == "python" and marker in b.text)
    return found


def steps(block: Block) -> Iterator[Step]:
    """The commands of a block, in order."""
    if block.title:
        yield Step(f"cat > {block.title} <<'END_OF_FILE'\n{block.text}END_OF_FILE")
    elif block.language == "python":
        yield Step(f"python - <<'END_OF_FILE'\n{block.text}END_OF_FILE")
    elif block.language == "bash":
        for command in re.findall(r"(?:[^\n]*\\\n)*[^\n]+", block.text):
            if not command.lstrip().startswith("#"):
                yield Step(command)
    elif block.language == "console":
        for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
            command, shown = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", part, re.S).groups()  # type: ignore[union-attr]
            yield Step(command, shown)


def commands(block: Block) -> list[str]:
    """The command lines of `surgery` in a block."""
    if block.title or block.language not in ("bash", "console"):
        return []
    joined = (re.sub(r"\s*\\\n\s*", " ", step.command) for step in steps(block))
    return [line for line in joined if line.startswith("surgery ")]


def run(page: Path, folder: Path) -> list[tuple[Step, str]]:
    """Run every block of a page after those of docs/howto/README.md.

    Args:
        page: the page.
        folder: empty directory to run in.

    Returns:
        Each step of the page with its output.

    Raises:
        AssertionError: a command fails.
    """
    (folder / "examples").symlink_to(ROOT / "examples")
    prepared = [step for block in blocks(HOWTO / "README.md") for step in steps(block)]
    own = [step for block in blocks(page) for step in steps(block)] if page != HOWTO / "README.md" else []
    every = [*prepared, *own]
    logs = folder / ".steps"
    logs.mkdir()
    script = ["set -o pipefail"]
    for number, step in enumerate(every):
        (logs / f"{number}.sh").write_text(step.command + "\n")
        # One shell for the page: variables that a command sets hold for the next.
        script.append(f"source {logs}/{number}.sh > {logs}/{number}.out 2>&1 || exit $((100 + {number}))")
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(["bash", "-c", "\n".join(script)], cwd=folder, env=environment, timeout=1800)
    said = [
        (logs / f"{n}.out").read_text() if (logs / f"{n}.out").exists() else "" for n in range(len(every))
    ]
    assert done.returncode == 0, (
        f"{page.name}: {every[done.returncode - 100].command}\n{said[done.returncode - 100]}"
    )
    return list(zip(every, said, strict=True))[len(prepared) :]


def visible(output: str) -> str:
    """The output without progress bars and warnings of other libraries, and without spaces at the ends of lines."""
    lines = (line.rsplit("\r", 1)[-1].rstrip() for line in output.splitlines())
    return "".join(f"{line}\n" for line in lines if line and not _NOISE.search(line))


def same(shown: str, output: str) -> bool:
    """True if two outputs differ in numbers and spaces only."""
    return _masked(shown) == _masked(output)


def _masked(output: str) -> list[str]:
    return [re.sub(r"\W*\d[\d.,e+-]*[kMB%]?|\s+", " ", line).strip() for line in visible(output).splitlines()]


def rewrite(page: Path, done: list[tuple[Step, str]]) -> None:
    """Write the output of a run into the ```console blocks of a page."""
    ran = iter(done)

    def block(found: re.Match[str]) -> str:
        made = Block("", found["language"], found["info"].strip(), found["text"])
        mine = [next(ran) for _ in steps(made)]
        if made.language != "console":
            return found[0]
        shown = "".join(f"$ {step.command}\n{visible(output)}" for step, output in mine)
        return f"```console{found['info']}\n{shown}```"

    page.write_text(_FENCE.sub(block, page.read_text()))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            rewrite(Path(name).resolve(), run(Path(name).resolve(), Path(place)))
        print(f"wrote {name}")
