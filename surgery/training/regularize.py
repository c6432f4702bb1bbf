"""`--regularize l1=1e-4@TARGET`: penalties that are added to the loss."""

from __future__ import annotations

from surgery.errors import TrainingError
from surgery.penalties import Penalty, group_lasso, l1
from surgery.program import Program

KINDS = {"l1": l1, "group-lasso": group_lasso}


def penalty(program: Program, text: str) -> Penalty:
    """The penalty that a text says. Raises TrainingError for another, TargetError, PassError."""
    kind, _, rest = text.partition("=")
    strength, at, target = rest.partition("@")
    try:
        number = float(strength)
    except ValueError:
        number = None
    if kind not in KINDS or number is None or not at or not target:
        raise TrainingError(
            f"--regularize {text!r}: write l1=1e-4@TARGET, or group-lasso=1e-4@TARGET for whole filters"
        )
    return KINDS[kind](program, target, number)
