"""A complete training request: objective, data and settings. The command line and recipes both make one."""

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
class TrainingRequest:
    """A training request.

    Attributes:
        objective: objective to train with.
        data: files of one format, or one directory, by name of the data set. The name is "" if the objective reads
            one data set.
        held_out: share of the data to hold out, below 1 (0: none), or a file.
        tokenizer: directory of a tokenizer that replaces the model's own, or None.
        settings: options of the loop.
    """

    objective: Objective
    data: Mapping[str, tuple[Path, ...]]
    held_out: float | Path = float(HELD_OUT)
    tokenizer: str | None = None
    settings: Settings = field(default_factory=Settings)

    def rows(self) -> Rows:
        """Read the data and split off the held-out rows.

        Raises:
            TrainingError: the data cannot be read or split.
            MissingExtraError: datasets is not installed.
        """

        seed = self.settings.seed
        if not self.objective.several:
            files = (self.held_out,) if isinstance(self.held_out, Path) else ()
            share = 0.0 if files else float(str(self.held_out))
            return split(read_rows(self.data[""], files), share, seed)
        if isinstance(self.held_out, Path):
            raise TrainingError(
                f"--held-out {self.held_out}: with several data sets give a share, or directories with their own "
                f"held-out splits"
            )
        share = self.held_out
        return joined({name: split(read_rows(files), share, seed) for name, files in self.data.items()})

    def written(self) -> dict[str, Any]:
        """Return the request as a mapping that `parse` accepts."""
        return {
            "objective": {"name": self.objective.name, **self.objective.options(given_only=True)},
            "data": [str(f) for f in self.data[""]]
            if "" in self.data
            else {name: [str(f) for f in files] for name, files in self.data.items()},
            "held_out": self.held_out if isinstance(self.held_out, float) else str(self.held_out),
            **({"tokenizer": self.tokenizer} if self.tokenizer else {}),
            **self.settings.options(given_only=True),
        }

    @staticmethod
    def parse(given: Mapping[str, Any], plugins: Plugins) -> TrainingRequest:
        """Parse untrusted options.

        Args:
            given: options of a request and of Settings, by name. An objective is a name, or a mapping of `name` and
                its options.
            plugins: plugin manager with the objectives.

        Raises:
            TrainingError: an option is unknown or invalid.
        """
        wanted = given.get("objective")
        asked = {"name": wanted} if isinstance(wanted, str) else wanted
        if not isinstance(asked, Mapping) or not isinstance(asked.get("name"), str):
            raise TrainingError("'objective' is invalid; give a name, or a mapping of 'name' and its options")
        options = {_key(key): value for key, value in asked.items() if key != "name"}
        objective = find_objective(plugins, asked["name"]).cls.parse(options)
        data = _files(given.get("data"), objective)
        settings = {_key(key): value for key, value in given.items() if _key(key) not in _OWN}
        tokenizer = given.get("tokenizer")
        return TrainingRequest(
            objective,
            data,
            share_or_file(given.get("held_out", given.get("held-out", HELD_OUT))),
            None if tokenizer is None else str(tokenizer),
            Settings.parse({key: value for key, value in settings.items() if not _absent(value)}),
        )


def _files(given: Any, objective: Objective) -> dict[str, tuple[Path, ...]]:
    """Return the files of each data set, from a mapping, or from texts NAME=FILE if the objective reads several."""
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
                    f"--data {text}: objective {objective.name!r} reads several data sets; write NAME={text}"
                )
            pairs.append((name, path))
    if not pairs or not all(isinstance(path, str | Path) for _, path in pairs):
        raise TrainingError("'data' is missing or invalid; give a file, a directory, or a list of files")
    if isinstance(listed, Mapping) and not objective.several:
        raise TrainingError(
            f"'data' names data sets, but objective {objective.name!r} reads one; give its files"
        )
    found: dict[str, tuple[Path, ...]] = {}
    for name, path in pairs:
        found[name] = (*found.get(name, ()), Path(path))
    return found


def share_or_file(given: Any) -> float | Path:
    """Parse a share of the data, or a path.

    Raises:
        TrainingError: a number is below 0, or 1 or more.
    """
    try:
        share = float(given)
    except (TypeError, ValueError):
        return Path(str(given))
    if not 0 <= share < 1:
        raise TrainingError(f"--held-out {given} is out of range; give a share from 0 to below 1, or a file")
    return share


def _absent(value: Any) -> bool:
    """Return True if a value means that an option was not given on the command line. 0 is a value."""
    return value is None or value is False or value == ()


def _key(name: Any) -> str:
    return str(name).replace("-", "_")
