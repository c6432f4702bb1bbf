"""What a training is told: an objective, the data, and how it goes. The command line and a recipe both make one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import TrainingError
from surgery.plugins import Plugins
from surgery.training.objective import Objective
from surgery.training.settings import Settings

if TYPE_CHECKING:
    from surgery.training.data import Rows

HELD_OUT = "0.1"
_OWN = ("objective", "data", "held_out", "tokenizer")


@dataclass(frozen=True)
class Lesson:
    """data: files of one format, or one directory. held_out: a share of it below 1 (0: none), or a file.
    tokenizer: a directory, in place of the tokenizer that lies with the model."""

    objective: Objective
    data: tuple[Path, ...]
    held_out: float | Path = float(HELD_OUT)
    tokenizer: str | None = None
    settings: Settings = field(default_factory=Settings)

    def rows(self) -> Rows:
        """The data, with what is held out. Raises TrainingError, MissingExtraError."""
        from surgery.training.data import read_rows, split

        share = self.held_out if isinstance(self.held_out, float) else None
        files = (self.held_out,) if isinstance(self.held_out, Path) else ()
        return split(read_rows(self.data, files), share or 0.0, self.settings.seed)

    def written(self) -> dict[str, Any]:
        """What `parse` reads back."""
        return {
            "objective": {"name": self.objective.name, **self.objective.given_options()},
            "data": [str(file) for file in self.data],
            "held_out": self.held_out if isinstance(self.held_out, float) else str(self.held_out),
            **({"tokenizer": self.tokenizer} if self.tokenizer else {}),
            **self.settings.given_options(),
        }

    @staticmethod
    def parse(given: Mapping[str, Any], plugins: Plugins) -> Lesson:
        """From untrusted options by name: those of a lesson, and all of Settings. An objective is a name, or a mapping
        of `name` and its options. Raises TrainingError."""
        wanted = given.get("objective")
        asked = {"name": wanted} if isinstance(wanted, str) else wanted
        if not isinstance(asked, Mapping) or not isinstance(asked.get("name"), str):
            raise TrainingError("'objective' is a name, or a mapping of 'name' and its options")
        options = {_key(key): value for key, value in asked.items() if key != "name"}
        objective = plugins.find_objective(asked["name"]).cls.parse(options)
        data = given.get("data") or ()
        files = (data,) if isinstance(data, str | Path) else data
        if not isinstance(files, Sequence) or not all(isinstance(f, str | Path) for f in files) or not files:
            raise TrainingError("'data' is a file or a directory, or a list of files")
        settings = {_key(key): value for key, value in given.items() if _key(key) not in _OWN}
        tokenizer = given.get("tokenizer")
        return Lesson(
            objective,
            tuple(Path(f) for f in files),
            share_or_file(given.get("held_out", given.get("held-out", HELD_OUT))),
            None if tokenizer is None else str(tokenizer),
            Settings.parse({key: value for key, value in settings.items() if value not in (None, (), False)}),
        )


def share_or_file(given: Any) -> float | Path:
    """A share of the data as a number, or a file. Raises TrainingError for a share of 1 or more, or below 0."""
    try:
        share = float(given)
    except (TypeError, ValueError):
        return Path(str(given))
    if not 0 <= share < 1:
        raise TrainingError(f"--held-out {given}: give a share of the data below 1, or a file")
    return share


def _key(name: Any) -> str:
    return str(name).replace("-", "_")
