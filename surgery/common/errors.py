"""Errors that a user can act on: one sentence that names the pass, the site and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeryError(Exception):
    """Base of every error that the command line prints as one line with exit code 2."""


class LoadError(SurgeryError):
    """A model reference, file or saved directory could not be read."""


class CaptureError(SurgeryError):
    """A module could not be captured as a graph, or its capture disagrees with eager."""


class TargetError(SurgeryError):
    """A target matches nothing, wholly or in part."""


class PassError(SurgeryError):
    """A pass is unknown, misconfigured, refused, or breaks its declared numerics."""


class JournalError(SurgeryError):
    """A journal cannot be replayed, undone or read."""


class ExportError(SurgeryError):
    """An export failed, or its result does not agree with the program."""


class TrainingError(SurgeryError):
    """An objective, its data or a checkpoint is wrong, or training cannot go on."""


class PluginError(SurgeryError):
    """A plugin is broken, missing, or clashes with another."""


class MissingExtraError(SurgeryError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed; pip install 'torch-surgery[{extra}]'")


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> str:
    """A clause `; did you mean 'a' or 'b'?`, or an empty string where nothing is near."""
    names = list(dict.fromkeys(candidates))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.5)
    if not close:
        close = [name for name in names if word and word.lower() in name.lower()][:count]
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
