"""Interleaved timing: every round runs each variant once, so machine load affects all variants alike."""

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
    """A variant to time.

    Attributes:
        run: Timed function; its argument is the result of `prepare`.
        prepare: Untimed function that is called before every run.
    """

    run: Run
    prepare: Callable[[], Any] = nothing


@dataclass(frozen=True)
class Times:
    """Seconds of every variant, round by round."""

    rounds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratios(self, name: str, peer: str) -> list[float]:
        """Ratios round by round, so that a slow phase of the machine affects both sides of a ratio."""
        return [a / b for a, b in zip(self.rounds[name], self.rounds[peer], strict=True)]


def measure(variants: Mapping[str, Variant], rounds: int, warmup: int = 1) -> Times:
    """Time all variants in interleaved rounds.

    With one thread, times are CPU times of this process, so other programs on the machine do not matter. With more
    threads they are wall times. Garbage collection is off in the timed part, as in timeit.

    Args:
        variants: Name -> variant.
        rounds: Number of timed rounds.
        warmup: Number of untimed rounds before them.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in variants}
    gc.freeze()  # Existing objects need not be scanned before every run.
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
    """One line of the table.

    Attributes:
        benchmark: Name of the benchmark.
        what: The measured operation or quantity.
        peer_name: Name of the peer.
        ours: Our median.
        peer: The peer's median.
        ratio: Median of ours / peer.
        low: Lower quartile of the ratio over rounds.
        high: Upper quartile of the ratio over rounds.
        aim: Largest ratio that meets the target, or None without a target.
        unit: Unit of `ours` and `peer`.
        note: Remark for the reader.
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
    """A row that compares two variants of one measurement.

    Args:
        benchmark: Name of the benchmark.
        what: The measured operation.
        times: Times of all variants.
        ours: Name of our variant.
        peer: Name of the peer's variant.
        aim: Largest ratio that meets the target, or None.
        note: Remark for the reader.
    """
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
