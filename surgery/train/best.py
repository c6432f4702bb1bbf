"""The best weights of a run: the start, or those of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.train.checkpoint import State
from surgery.train.objective import Objective


@dataclass(frozen=True)
class Result:
    """Result of a training.

    Attributes:
        steps: number of finished steps.
        best: step whose weights the program has now.
        metrics: metrics of these weights on held-out data, empty without held-out data.
        before: the same metrics before training.
        stopped: True if training stopped early for lack of improvement (`patience`).
        tried: best metrics of the trained weights, if the start was better and was kept (`best` is 0); else empty.
    """

    steps: int
    best: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    stopped: bool = False
    tried: Mapping[str, float] = field(default_factory=dict)


class Best:
    """Compares evaluations by the metric of an objective.

    Attributes:
        tried: best metrics of the trained weights so far.
    """

    def __init__(self, objective: Objective) -> None:
        self.metric, self.larger = objective.metric, objective.larger
        self.tried: Mapping[str, float] = {}

    def start(self, before: Mapping[str, float]) -> State:
        """Return the state of a run that begins: the start is the best so far, if it was evaluated."""
        score = before.get(self.metric, math.nan)
        return State() if math.isnan(score) else State(best=0, score=score)

    def record(self, state: State, metrics: Mapping[str, float]) -> bool:
        """Record an evaluation after the step of a state. Return True if its weights are the best.

        Weights that are as good as the start count as better: a training that changes nothing measurable is kept.
        """
        if not self.tried or self._beats(metrics[self.metric], self.tried[self.metric]):
            self.tried = metrics
        score = metrics[self.metric]
        ties = state.best == 0 and score == state.score
        if state.score is None or self._beats(score, state.score) or ties:
            state.best, state.score, state.stale = state.step, score, 0
            return True
        state.stale += 1
        return False

    def _beats(self, score: float, other: float) -> bool:
        return score > other if self.larger else score < other
