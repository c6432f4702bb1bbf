"""`--regularize l1=1e-4@TARGET`: penalties on weights while they train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surgery.common.errors import TrainingError
from surgery.engine.program import Program
from surgery.train.penalties import Penalty, group_lasso, l1

KINDS = {"l1": l1, "group-lasso": group_lasso}


@dataclass(frozen=True)
class Regularizer:
    """A penalty and how it acts: by its proximal step after the optimiser's, which reaches zero; or, where a pass
    computes a weight that it is on, as a term of the loss, which does not.

    text: as it was given.
    """

    text: str
    penalty: Penalty

    @staticmethod
    def of(program: Program, text: str) -> Regularizer:
        """What a text says. Raises TrainingError for another, TargetError, PassError."""
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
        return Regularizer(text, KINDS[kind](program, target, number))

    @property
    def proximal(self) -> bool:
        return self.penalty.has_steps

    def notes(self) -> list[str]:
        """What a person has to know before training."""
        if self.proximal:
            return []
        return [
            f"--regularize {self.text}: a pass computes a weight there, so that it is a term of the loss, under which "
            f"values come near zero and never to it"
        ]

    def terms(self) -> list[Tensor]:
        """What is added to the loss."""
        return [] if self.proximal else [self.penalty()]

    def step(self, rate: float) -> None:
        """After the optimiser's step, at this learning rate."""
        if self.proximal:
            self.penalty.prox_(rate)

    def said(self) -> str:
        """What it has come to."""
        zeros, groups = self.penalty.zeros()
        return f"{self.text}: {zeros:,} of {groups:,} {self.penalty.over} are zero"
