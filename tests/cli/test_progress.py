"""Progress on the command line: bars on a terminal after a delay, nothing in a pipe or with --quiet."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest

from surgery.cli import cli
from surgery.cli.group import BUILT_IN

ROOT = Path(__file__).parents[2]
# A command of half a second in five steps. The delay is shortened to a tenth, so that the test need not last longer.
RUN = """
import sys, time, types
import click
from surgery.cli import group, main, progress
from surgery.common.progress import stage, track
progress.DELAY = float(sys.argv.pop(1))

def work(fail):
    with stage("preparing"):
        for number in track(range(5), "merging"):
            time.sleep(0.1)
            if fail and number == 3:
                raise click.UsageError("it failed")
    click.echo("done")

# As a built-in command, for which no plugin is loaded.
made = types.ModuleType("surgery.cli.made")
made.work = click.Command("work", params=[click.Option(["--fail"], is_flag=True)], callback=work)
sys.modules["surgery.cli.made"] = made
group.BUILT_IN["work"] = ("made", "work", "")
main(sys.argv[1:])
"""


def on_a_terminal(*args, delay=0.1):
    """Standard output (a pipe) and standard error (a terminal) of the command, and its exit code."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.Popen(
            [sys.executable, "-c", RUN, str(delay), *args], stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the process has closed the terminal
                break
            if not part:
                break
            shown += part
        out = done.communicate(timeout=60)[0]
    finally:
        os.close(ours)
    return out.decode(), shown.decode(), done.returncode


def test_bars_appear_on_the_terminal_and_not_in_the_output():
    out, shown, code = on_a_terminal("work")
    assert (out, code) == ("done\n", 0)
    assert "merging" in shown
    assert "preparing" in shown
    assert "/5" in shown


def test_short_work_and_quiet_show_nothing():
    assert on_a_terminal("work", delay=30) == ("done\n", "", 0)
    assert on_a_terminal("work", "--quiet") == ("done\n", "", 0)


def test_an_error_is_the_last_line():
    out, shown, code = on_a_terminal("work", "--fail")
    assert (out, code) == ("", 2)
    assert "merging" in shown
    assert shown.rstrip().endswith("error: it failed")


def test_a_pipe_gets_nothing():
    command = [sys.executable, "-c", RUN, "0.1", "work"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_command_can_be_quiet(name):
    command = cli.get_command(click.Context(cli), name)
    again = cli.get_command(click.Context(cli), name)
    assert command is again
    assert sum("--quiet" in parameter.opts for parameter in command.params) == 1
