"""Start-up of the command line: CPU time of new processes, relative to `python -c "import click, rich"`.

Help, version and completion must not import torch, whose import alone takes about two seconds. CPU time is that of the
processes themselves (user and system), so other programs on the machine hardly matter. Every round starts each process
once. `import torch` and a command that loads the plugins are measured for comparison, without an aim.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import Row, Times, compare
from surgery.cli.group import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]
AIM = 3.0
PEER = "import click, rich"
SURGERY = (sys.executable, "-m", "surgery")
COMPLETE = "_SURGERY_COMPLETE"


def run(quick: bool) -> Iterator[Row]:
    commands = ("apply", "train") if quick else tuple(BUILT_IN)
    starts: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        PEER: ((sys.executable, "-c", PEER), {}),
        "surgery --help": ((*SURGERY, "--help"), {}),
        "surgery --version": ((*SURGERY, "--version"), {}),
        "completion of a command": (SURGERY, _completion("surgery", "")),
        "completion of an option": (SURGERY, _completion("surgery", "apply", "--")),
        **{f"surgery {name} --help": ((*SURGERY, name, "--help"), {}) for name in commands},
        "import surgery": ((sys.executable, "-c", "import surgery"), {}),
    }
    slow: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "import torch": ((sys.executable, "-c", "import torch"), {}),
        "surgery passes": ((*SURGERY, "passes"), {}),
    }
    if not quick:
        starts.update(slow)
    times = _measure(starts, rounds=3 if quick else 15)
    for name in starts:
        if name != PEER:
            yield compare("startup", name, times, name, PEER, None if name in slow else AIM)


def _completion(*words: str) -> dict[str, str]:
    """Environment in which `surgery` prints what bash completion offers for the last word."""
    place = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    # The variable is named for the program; `python -m surgery` calls itself "surgery" too.
    return {COMPLETE: "bash_complete", **place}


def _measure(starts: dict[str, tuple[tuple[str, ...], dict[str, str]]], rounds: int) -> Times:
    """CPU time of each process, round by round. The first round only fills the file cache and does not count."""
    found: dict[str, list[float]] = {name: [] for name in starts}
    for number in range(-1, rounds):
        for name, (command, environment) in starts.items():
            begun = _children()
            subprocess.run(
                command,
                env={**os.environ, **environment},
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if number >= 0:
                found[name].append(_children() - begun)
    return Times(found)


def _children() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
