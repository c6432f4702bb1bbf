"""What is told while training goes on, and files that keep it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.common.errors import MissingExtraError, TrainingError


class Watcher:
    """Told what happens; does nothing with it."""

    def begun(self, step: int, steps: int) -> None:
        """Training starts, or goes on, at a step of so many."""

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        """So many steps are done. rate: the learning rate of the last. tokens: what it read."""

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        """What an objective says of its own step beside the loss."""

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        """Held-out data was scored."""

    def noted(self, step: int, sentence: str) -> None:
        """Something a person should know, such as that a schedule acts in this step, counted from 1."""

    def ended(self) -> None:
        """No more will come."""


class Watchers(Watcher):
    """Several, told in order."""

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
    """Raises TrainingError for what cannot be written there."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written: {error.strerror or error}; mend that, and go on with --resume"
        ) from error


class LogFile(Watcher):
    """One JSON object a line. What a resumed run does again is taken out first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begun(self, step: int, steps: int) -> None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read_log(self.path) if row["step"] <= step] if step else []
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
    """The rows of a log; a last line that was cut off when its process died is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TensorBoard(Watcher):
    """Event files for TensorBoard. Raises MissingExtraError where that is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "train") from None
        self.folder, self.make = folder, SummaryWriter
        self.writer: Any = None

    def begun(self, step: int, steps: int) -> None:
        with writing(self.folder):
            self.writer = self.make(str(self.folder), purge_step=step or None)

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        self._scalars("train", {"loss": loss, "lr": rate}, step)

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        self._scalars("train", figures, step)

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        self._scalars("held_out", metrics, step)

    def noted(self, step: int, sentence: str) -> None:
        with writing(self.folder):
            self.writer.add_text("notes", sentence, step)

    def ended(self) -> None:
        if self.writer is not None:
            with writing(self.folder):
                self.writer.close()

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        with writing(self.folder):
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)
