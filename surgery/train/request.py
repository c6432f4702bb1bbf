"""What a training is told: an objective, the data, and how it goes. The command line and a recipe both make one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.common.errors import TrainingError
from surgery.common.plugins import Plugins
from surgery.train.data import Rows, read_rows, split
from surgery.train.objective import Objective
from surgery.train.options import Settings
from surgery.train.registry import find_objective
from surgery.train.tables import joined

HELD_OUT = "0.1"
_OWN = ("objective", "data", "held_out", "tokenizer")


@dataclass(frozen=True)
class Lesson:
    """data: files of one format, or one directory, by the name of the data set: "" where an objective reads but one.
    held_out: a share of it below 1 (0: none), or a file. tokenizer: a directory, in place of the tokenizer that lies
    with the model."""

    objective: Objective
    data: Mapping[str, tuple[Path, ...]]
    held_out: float | Path = float(HELD_OUT)
    tokenizer: str | None = None
    settings: Settings = field(default_factory=Settings)

    def rows(self) -> Rows:
        """The data, with what is held out. Raises TrainingError, MissingExtraError."""

        seed = self.settings.seed
        if not self.objective.several:
            files = (self.held_out,) if isinstance(self.held_out, Path) else ()
            share = 0.0 if files else float(str(self.held_out))
            return split(read_rows(self.data[""], files), share, seed)
        if isinstance(self.held_out, Path):
            raise TrainingError(
                f"--held-out {self.held_out}: of several data sets give a share, or directories that have splits of "
                f"their own"
            )
        share = self.held_out
        return joined({name: split(read_rows(files), share, seed) for name, files in self.data.items()})

    def written(self) -> dict[str, Any]:
        """What `parse` reads back."""
        return {
            "objective": {"name": self.objective.name, **self.objective.given_options()},
            "data": [str(f) for f in self.data[""]]
            if "" in self.data
            else {name: [str(f) for f in files] for name, files in self.data.items()},
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
        objective = find_objective(plugins, asked["name"]).cls.parse(options)
        data = _files(given.get("data"), objective)
        settings = {_key(key): value for key, value in given.items() if _key(key) not in _OWN}
        tokenizer = given.get("tokenizer")
        return Lesson(
            objective,
            data,
            share_or_file(given.get("held_out", given.get("held-out", HELD_OUT))),
            None if tokenizer is None else str(tokenizer),
            Settings.parse({key: value for key, value in settings.items() if not _absent(value)}),
        )


def _files(given: Any, objective: Objective) -> dict[str, tuple[Path, ...]]:
    """Files by the name of the data set: of a mapping, or of texts NAME=FILE, where an objective reads several."""
    listed = (given,) if isinstance(given, str | Path) else given
    pairs: list[tuple[str, Any]] = []
    if isinstance(listed, Mapping):
        for name, files in listed.items():
            pairs += [(str(name), f) for f in ((files,) if isinstance(files, str | Path) else files or ())]
    elif isinstance(listed, Sequence):
        for text in listed:
            name, equals, path = str(text).partition("=") if objective.several else ("", "=", text)
            if not equals:
                raise TrainingError(
                    f"--data {text}: objective {objective.name!r} reads several; write NAME={text}"
                )
            pairs.append((name, path))
    if not pairs or not all(isinstance(path, str | Path) for _, path in pairs):
        raise TrainingError("'data' is a file or a directory, or a list of files")
    if isinstance(listed, Mapping) and not objective.several:
        raise TrainingError(
            f"'data' names data sets, and objective {objective.name!r} reads one: give its files"
        )
    found: dict[str, tuple[Path, ...]] = {}
    for name, path in pairs:
        found[name] = (*found.get(name, ()), Path(path))
    return found


def share_or_file(given: Any) -> float | Path:
    """A share of the data as a number, or a file. Raises TrainingError for a share of 1 or more, or below 0."""
    try:
        share = float(given)
    except (TypeError, ValueError):
        return Path(str(given))
    if not 0 <= share < 1:
        raise TrainingError(f"--held-out {given}: give a share of the data below 1, or a file")
    return share


def _absent(value: Any) -> bool:
    """Whether a value is what the command line has where an option was not given; 0 is not."""
    return value is None or value is False or value == ()


def _key(name: Any) -> str:
    return str(name).replace("-", "_")
