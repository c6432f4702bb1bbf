"""Interleaved timing: every round runs each variant once, so that what slows the machine slows them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[Any], Any]


def nothing() -> None:
    return None


@dataclass(frozen=True)
class Variant:
    """run: what is timed, given what `prepare` returns. prepare: done before every run, untimed."""

    run: Run
    prepare: Callable[[], Any] = nothing


@dataclass(frozen=True)
class Times:
    """Seconds of every variant, round by round."""

    rounds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratios(self, name: str, peer: str) -> list[float]:
        """Round by round, so that a slow spell of the machine is in both sides of one ratio."""
        return [a / b for a, b in zip(self.rounds[name], self.rounds[peer], strict=True)]


def measure(variants: Mapping[str, Variant], rounds: int, warmup: int = 1) -> Times:
    """The times of all variants, interleaved, after `warmup` rounds that do not count.

    With one thread it is the CPU time of this process: other programs on the machine do not count. With more it
    is wall time. The collector of garbage is off in the timed part, as in timeit.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in variants}
    gc.freeze()  # what is there already need not be looked at before every run
    try:
        for number in range(-warmup, rounds):
            for name, variant in variants.items():
                given = variant.prepare()
                gc.collect()
                gc.disable()
                begun = clock()
                result = variant.run(given)
                seconds = clock() - begun
                gc.enable()
                del result, given
                if number >= 0:
                    found[name].append(seconds)
    finally:
        gc.unfreeze()
    return Times(found)


@dataclass(frozen=True)
class Row:
    """One line of the table. ratio: ours over the peer's. low, high: the quartiles of its rounds.

    aim: what the ratio is to be at most; None where there is no aim. note: what a reader has to know.
    """

    benchmark: str
    what: str
    peer_name: str = ""
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    aim: float | None = None
    unit: str = "s"
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.aim is None or self.ratio is None else self.ratio <= self.aim


def compare(
    benchmark: str, what: str, times: Times, ours: str, peer: str, aim: float | None = None, note: str = ""
) -> Row:
    """A row from two variants of one measurement."""
    ratios = times.ratios(ours, peer)
    low, high = quartiles(ratios)
    ratio = statistics.median(ratios)
    mine, theirs = times.median(ours), times.median(peer)
    return Row(benchmark, what, peer, mine, theirs, ratio, low, high, aim, note=note)


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
