"""Which examples a process learns from at a step, and what is drawn there: functions of the seed, so that a run that is
resumed goes on as it would have."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

from torch import Generator


class Order:
    """seed: of everything. epoch: makes the batches of an epoch, as numbers of examples, with a generator. accumulate:
    batches of a process in one step. index, processes: this process among all."""

    def __init__(
        self,
        seed: int,
        epoch: Callable[[Generator], list[list[int]]],
        accumulate: int = 1,
        index: int = 0,
        processes: int = 1,
    ) -> None:
        self.seed, self.index, self.processes = seed, index, processes
        self._epoch = epoch
        self._ready: tuple[int, list[list[int]]] = (-1, [])
        self._window = accumulate * processes
        self.steps = math.ceil(len(self.epoch(0)) / self._window)

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of an epoch, of all processes."""
        if self._ready[0] != number:
            self._ready = (number, self._epoch(self.draw("order", number)))
        return self._ready[1]

    def batches(self, step: int) -> list[tuple[int, list[int], bool]]:
        """This process's batches of a step: the place of each in the epoch, the numbers of its examples, and whether it
        counts.

        Every process has as many. One that has none of its own has another's, which does not count, at a place past the
        end.
        """
        order, start = self.epoch(step // self.steps), step % self.steps * self._window
        end = min(start + self._window, len(order))
        rounds = math.ceil((end - start) / self.processes)
        places = range(start + self.index, start + rounds * self.processes, self.processes)
        return [
            (place, order[place], True) if place < end else (len(order) + place, order[start], False)
            for place in places
        ]

    def number(self, *what: object) -> int:
        """A number that is drawn from the seed for one purpose."""
        text = "/".join(map(str, (self.seed, *what)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    def draw(self, *what: object) -> Generator:
        return Generator().manual_seed(self.number(*what))
