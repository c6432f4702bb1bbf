"""Deterministic batch order: the examples and random draws of each step are a function of the seed.

A resumed run therefore continues exactly as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

from torch import Generator


class Order:
    """The batches of every step and the random generators of a run.

    Attributes:
        seed: seed of all draws.
        index: index of this process.
        processes: number of processes.
        steps: optimizer steps per epoch.
    """

    def __init__(
        self,
        seed: int,
        epoch: Callable[[Generator], list[list[int]]],
        accumulate: int = 1,
        index: int = 0,
        processes: int = 1,
    ) -> None:
        """Make the order of a run.

        Args:
            seed: seed of all draws.
            epoch: function that makes the batches of one epoch, as example indices, with a generator.
            accumulate: batches of one process in a step.
            index: index of this process.
            processes: number of processes.
        """
        self.seed, self.index, self.processes = seed, index, processes
        self._epoch = epoch
        self._ready: tuple[int, list[list[int]]] = (-1, [])
        self._window = accumulate * processes
        self.steps = math.ceil(len(self.epoch(0)) / self._window)

    def epoch(self, number: int) -> list[list[int]]:
        """Return the batches of an epoch, for all processes."""
        if self._ready[0] != number:
            self._ready = (number, self._epoch(self.draw("order", number)))
        return self._ready[1]

    def batches(self, step: int) -> list[tuple[int, list[int], bool]]:
        """Return the batches of this process for a step.

        Every process gets the same number of batches, because sharded parameters are gathered by all processes
        together. A process that runs out repeats the first batch of the step, which does not count, at a position
        past the end.

        Returns:
            For each batch its position in the epoch, its example indices, and True if it counts.
        """
        order, start = self.epoch(step // self.steps), step % self.steps * self._window
        end = min(start + self._window, len(order))
        rounds = math.ceil((end - start) / self.processes)
        places = range(start + self.index, start + rounds * self.processes, self.processes)
        return [
            (place, order[place], True) if place < end else (len(order) + place, order[start], False)
            for place in places
        ]

    def number(self, *purpose: object) -> int:
        """Derive a number from the seed for one purpose, see `number_for`."""
        return number_for(self.seed, *purpose)

    def draw(self, *purpose: object) -> Generator:
        """Return a generator seeded for one purpose."""
        return draw_for(self.seed, *purpose)


def number_for(seed: int, *purpose: object) -> int:
    """Derive a number from a seed for one purpose.

    A hash makes the numbers of different purposes and steps independent without any stored generator state.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def draw_for(seed: int, *purpose: object) -> Generator:
    """Return a generator seeded for one purpose."""
    return Generator().manual_seed(number_for(seed, *purpose))
