"""Runs named checks in order and reports each: the loop that the checks of objectives, loaders and ops share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from surgery.common.errors import SurgeryError
from surgery.testing.case import ConformanceError, Skip
from surgery.testing.report import ConformanceReport, Outcome


def run_steps(name: str, steps: Mapping[str, Callable[[], str]], raises: bool) -> ConformanceReport:
    """Run checks in order.

    Args:
        name: What is checked, for messages.
        steps: Name of a check -> function that returns what it observed, or raises.
        raises: False collects failures in the report instead of raising at the first one.

    Raises:
        ConformanceError: A check fails, or the checked code raises an error that the check did not expect.
    """
    outcomes: list[Outcome] = []
    for step, check in steps.items():
        begun = perf_counter()
        try:
            status, detail = "passed", check()
        except Skip as skip:
            status, detail = "skipped", str(skip)
        except Exception as error:
            failure = error if isinstance(error, ConformanceError) else _failure(name, step, error)
            if raises:
                raise failure from error
            status, detail = "failed", str(failure)
        outcomes.append(Outcome(step, status, detail, perf_counter() - begun))
    return ConformanceReport(name, tuple(outcomes))


def _failure(name: str, step: str, error: Exception) -> ConformanceError:
    text = str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
    return ConformanceError(name, step, " ".join(text.split())[:500])
