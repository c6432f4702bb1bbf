"""Receivers of training progress: the JSON log, and the base class for others (see tracking)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.common.errors import TrainingError


class Watcher:
    """Base of receivers of training progress. All methods do nothing."""

    def begun(self, step: int, steps: int) -> None:
        """Called when training starts, or resumes.

        Args:
            step: number of finished steps.
            steps: number of steps of the whole training.
        """

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        """Called after each step.

        Args:
            step: number of finished steps.
            loss: loss of the last step.
            rate: learning rate of the last step.
            tokens: tokens read in the last step.
        """

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        """Called with other figures of a step, such as a penalty or those of an on-policy objective."""

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        """Called after each evaluation.

        Args:
            step: number of finished steps.
            metrics: metrics on the held-out data.
            best: True if this is the best evaluation so far.
        """

    def noted(self, step: int, sentence: str) -> None:
        """Called with a note for the user, such as that a schedule freezes parameters.

        Args:
            step: step of the note, counted from 1 (0: before training).
            sentence: the note.
        """

    def ended(self) -> None:
        """Called when training ends, also after an error."""


class Watchers(Watcher):
    """Passes every call to several watchers, in order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self.watchers = watchers

    def begun(self, step: int, steps: int) -> None:
        for each in self.watchers:
            each.begun(step, steps)

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        for each in self.watchers:
            each.stepped(step, loss, rate, tokens)

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        for each in self.watchers:
            each.measured(step, figures)

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        for each in self.watchers:
            each.evaluated(step, metrics, best)

    def noted(self, step: int, sentence: str) -> None:
        for each in self.watchers:
            each.noted(step, sentence)

    def ended(self) -> None:
        for each in self.watchers:
            each.ended()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of file access.

    Raises:
        TrainingError: a file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written: {error.strerror or error}; fix that, and continue with --resume"
        ) from error


class LogFile(Watcher):
    """A log with one JSON object per line.

    When a run resumes, entries after the last checkpoint are removed, because their steps are repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begun(self, step: int, steps: int) -> None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read_log(self.path) if row.get("step", 0) <= step] if step else []
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        self._write({"step": step, "loss": loss, "lr": rate, "tokens": tokens})

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        self._write({"step": step, "figures": dict(figures)})

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        self._write({"step": step, "held_out": dict(metrics), "best": best})

    def noted(self, step: int, sentence: str) -> None:
        self._write({"step": step, "note": sentence})

    def _write(self, row: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log. An incomplete last line, left by a process that died, is skipped.

    Raises:
        TrainingError: a line is damaged.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except (ValueError, RecursionError):
        rows = [None]
    if not all(isinstance(row, dict) and isinstance(row.get("step", 0), int) for row in rows):
        raise TrainingError(f"{path} is damaged; remove it")
    return rows
