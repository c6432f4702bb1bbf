"""Experiment trackers: TensorBoard, MLflow, Weights & Biases and Trackio, through accelerate's own classes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgery.common.errors import MissingExtraError, SurgeryError, TrainingError, nearest
from surgery.common.readers import first_line
from surgery.train.watchers import Watcher, writing

# Every tracker is the name of its package.
TRACKERS = ("tensorboard", "mlflow", "trackio", "wandb")
PROJECT = "surgery"


def check_tracker(name: str) -> None:
    """Check that a tracker is known and installed.

    Raises:
        TrainingError: there is no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise TrainingError(
            f"there is no tracker {name!r}{nearest(name, TRACKERS) or '; there are ' + ', '.join(TRACKERS)}"
        )
    if find_spec(name) is None:
        raise TrainingError(
            f"--track {name} needs the package {name}, which is not installed; pip install {name}"
        )


class Tracked(Watcher):
    """Logs loss, learning rate, other figures and held-out metrics by step, as `train/…` and `held_out/…`.

    A tracker's own settings (the server, an offline mode, the name of the project) come from its environment variables,
    such as MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, WANDB_MODE and WANDB_PROJECT.
    """

    def __init__(
        self, name: str, folder: Path, title: str = "", facts: Mapping[str, Any] | None = None
    ) -> None:
        """Prepare a tracker.

        Args:
            name: one of TRACKERS.
            folder: directory of TensorBoard's files; the others write where they are set up to.
            title: name of the run.
            facts: options of the training to log once.

        Raises:
            TrainingError: the tracker is unknown or not installed.
            MissingExtraError: accelerate is not installed.
        """
        check_tracker(name)
        try:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        except ModuleNotFoundError:
            raise MissingExtraError("accelerate", "train") from None
        if name not in LOGGER_TYPE_TO_CLASS:
            raise TrainingError(f"--track {name} needs a newer accelerate; pip install -U accelerate")
        self.name, self.folder, self.title = name, folder, title
        self.facts = {key: _plain(value) for key, value in (facts or {}).items()}
        self._make: Any = LOGGER_TYPE_TO_CLASS[name]
        self._tracker: Any = None

    def begun(self, step: int, steps: int) -> None:
        with writing(self.folder):
            try:
                tracker = self._made(step)
                tracker.start()
                if self.facts and self.name != "tensorboard":
                    tracker.store_init_configuration({**self.facts, "steps": steps})
            except (OSError, SurgeryError):
                raise
            except Exception as error:
                raise TrainingError(f"--track {self.name} cannot start: {first_line(error)}") from error
        self._tracker = tracker

    def _made(self, step: int) -> Any:
        """The tracker of accelerate."""
        if self.name == "tensorboard":
            # Of a resumed run, entries after the checkpoint are repeated, so the old ones are hidden.
            return self._make(self.folder.name, self.folder.parent, purge_step=step or None)
        more = {"name": self.title} if self.title else {}
        if self.name == "mlflow":
            return self._make(PROJECT, run_name=self.title or None)
        return self._make(PROJECT, **more)

    def stepped(self, step: int, loss: float, rate: float, tokens: int) -> None:
        self._log("train", {"loss": loss, "lr": rate}, step)

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        self._log("train", figures, step)

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        self._log("held_out", metrics, step)

    def noted(self, step: int, sentence: str) -> None:
        # The others plot numbers alone; the log of the run has all notes.
        if self.name == "tensorboard":
            with writing(self.folder):
                self._tracker.log({"notes": sentence}, step=step)

    def ended(self) -> None:
        if self._tracker is not None:
            with writing(self.folder):
                self._tracker.finish()

    def _log(self, group: str, values: Mapping[str, float], step: int) -> None:
        with writing(self.folder):
            self._tracker.log({f"{group}/{name}": value for name, value in values.items()}, step=step)


def _plain(value: Any) -> Any:
    """A value that every tracker takes."""
    return value if isinstance(value, str | int | float | bool) else str(value)
