"""Progress in the terminal: bars on stderr for work that takes longer than two seconds, and none in a pipe.

This module imports rich when a bar is shown, so that short commands start without it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from surgery.common.progress import be_quiet, reporting

QUIET = "--quiet"
DELAY = 2.0  # seconds without a bar
_SHORT = 0.2  # seconds of work that is not shown later either


class TerminalProgress:
    """Receiver that shows each piece of work as a line, once the command has taken DELAY seconds.

    Later work that ends at once is not shown, so that lines do not flicker. Lines disappear when their work ends: only
    the output of the command stays.
    """

    def __init__(self, delay: float = DELAY) -> None:
        """Make the receiver. `delay` is the number of seconds without a bar."""
        self._delay = delay
        self._began = time.monotonic()
        self._lock = threading.RLock()
        # Work in progress: title, number of steps, finished steps, and the number of its line.
        self._running: dict[int, list[Any]] = {}
        self._next = 0
        self._timer: threading.Timer | None = None
        self._bars: Any = None

    def begin(self, title: str, total: int | None) -> int:
        """Note work that begins."""
        with self._lock:
            work, self._next = self._next, self._next + 1
            self._running[work] = [title, total, 0, None]
            if self._bars is not None:
                self._show(work)
            elif self._timer is None:
                passed = time.monotonic() - self._began
                self._timer = threading.Timer(
                    max(self._delay - passed, min(_SHORT, self._delay)), self._start
                )
                self._timer.daemon = True
                self._timer.start()
            return work

    def advance(self, work: int) -> None:
        """Note a finished step."""
        with self._lock:
            row = self._running.get(work)
            if row is None:
                return
            row[2] += 1
            if self._bars is not None:
                self._bars.advance(row[3])

    def end(self, work: int) -> None:
        """Remove the line of work; without any other the bars go."""
        with self._lock:
            row = self._running.pop(work, None)
            if row is not None and self._bars is not None and row[3] is not None:
                self._bars.remove_task(row[3])
            if not self._running:
                self._stop()

    def close(self) -> None:
        """Remove all lines. A loop that was left by an error may not have reported its end."""
        with self._lock:
            self._running.clear()
            self._stop()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        class Steps(MofNCompleteColumn):
            """Finished and all steps; nothing for work that is not countable."""

            def render(self, task: Any) -> Any:
                return super().render(task) if task.total is not None else ""

        with self._lock:
            # The work may have ended while this thread waited.
            if not self._running:
                return
            # The standard output stays untouched: it may be a pipe.
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                Steps(),
                Elapsed(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            for work in self._running:
                self._show(work)
            self._bars.start()

    def _show(self, work: int) -> None:
        title, total, done, _ = self._running[work]
        self._running[work][3] = self._bars.add_task(title, total=total, completed=done)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


@contextmanager
def terminal_progress(args: Sequence[str]) -> Iterator[None]:
    """A context in which progress is shown, if stderr is a terminal.

    Args:
        args: the command line. Plugins are loaded before click reads --quiet, so it is looked for here.
    """
    receiver = TerminalProgress(DELAY) if sys.stderr.isatty() else None
    try:
        with reporting(receiver):
            if QUIET in args:
                be_quiet()
            yield
    finally:
        if receiver is not None:
            receiver.close()


def add_quiet(command: click.Command) -> click.Command:
    """Add --quiet to a command, unless it has an option of that name. `terminal_progress` reads it."""
    if not any(QUIET in parameter.opts for parameter in command.params):
        option = click.Option(
            [QUIET],
            is_flag=True,
            expose_value=False,
            help="Show no progress.",
        )
        command.params.append(option)
    return command
