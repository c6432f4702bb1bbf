"""Errors that a user can fix. A message is one line: the fault, its place (pass, site, file), and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeryError(Exception):
    """Base of all errors of surgery. The command line prints them as one line and exits with code 2."""


class LoadError(SurgeryError):
    """A model reference, a file or a saved directory cannot be read."""


class CaptureError(SurgeryError):
    """A module cannot be captured as a graph, or the graph and the eager module give different outputs."""


class TargetError(SurgeryError):
    """A target, or a part of it, matches no site."""


class PassError(SurgeryError):
    """A pass is unknown, has wrong options, is refused, or changes outputs more than it declares."""


class JournalError(SurgeryError):
    """A journal cannot be replayed, undone or read."""


class ExportError(SurgeryError):
    """An export failed, or its outputs differ from those of the program."""


class TrainingError(SurgeryError):
    """An objective, its data or a checkpoint is wrong, or training cannot continue."""


class InterruptedTrainingError(TrainingError):
    """The user interrupted a training; the message names the checkpoint. The command line exits with code 130."""


class PluginError(SurgeryError):
    """A plugin is broken, missing, or in conflict with another."""


class MissingExtraError(SurgeryError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed; pip install 'torch-surgery[{extra}]'")


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> str:
    """The clause `; did you mean 'a' or 'b'?` for an unknown word, or "" if no candidate is similar.

    Args:
        word: the unknown word.
        candidates: known words.
        count: largest number of suggestions.
    """
    names = list(dict.fromkeys(candidates))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.5)
    if not close:
        # difflib misses a short word inside a long name, such as "mlp" in "decoder.mlp".
        close = [name for name in names if word and word.lower() in name.lower()][:count]
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
