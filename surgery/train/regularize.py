"""Penalties of `surgery train`, from texts such as `--regularize l1=1e-4@TARGET`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surgery.common.errors import TrainingError
from surgery.engine.program import Program
from surgery.train.penalties import Penalty, group_lasso, l1

KINDS = {"l1": l1, "group-lasso": group_lasso}


@dataclass(frozen=True)
class Regularizer:
    """A penalty and how it is applied.

    The proximal step after the optimizer's step reaches exact zeros. If a pass computes one of the weights, that step
    is impossible, and the penalty is added to the loss.

    Attributes:
        text: text of the option.
        penalty: the penalty.
    """

    text: str
    penalty: Penalty

    @staticmethod
    def of(program: Program, text: str) -> Regularizer:
        """Parse the text of the option.

        Raises:
            TrainingError: the text is not KIND=STRENGTH@TARGET.
            TargetError: the target matches nothing.
            PassError: a weight cannot be penalized.
        """
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
        """True if the penalty uses the proximal step."""
        return self.penalty.has_steps

    def notes(self) -> list[str]:
        """Return the notes to log before training."""
        if self.proximal:
            return []
        return [
            f"--regularize {self.text}: a pass computes one of these weights, so the penalty is added to the loss; "
            f"values come close to zero but not exactly to it"
        ]

    def terms(self) -> list[Tensor]:
        """Return the terms to add to the loss."""
        return [] if self.proximal else [self.penalty()]

    def step(self, rate: float) -> None:
        """Apply the proximal step after an optimizer step with this learning rate."""
        if self.proximal:
            self.penalty.prox_(rate)

    def said(self) -> str:
        """Describe how many groups are zero now."""
        zeros, groups = self.penalty.zeros()
        return f"{self.text}: {zeros:,} of {groups:,} {self.penalty.over} are zero"
