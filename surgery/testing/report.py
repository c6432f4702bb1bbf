"""Report of the conformance kit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Result of one check.

    Attributes:
        check: Name of the check.
        status: "passed", "skipped" or "failed".
        detail: Observed values, or the reason why it was skipped or failed.
        seconds: Wall-clock time in seconds.
    """

    check: str
    status: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class ConformanceReport:
    """Results of all checks, in order; print() shows them as a table.

    Attributes:
        pass_name: Name of the application that was checked.
        outcomes: Result of each check.
    """

    pass_name: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return not self.failed

    @property
    def passed(self) -> dict[str, str]:
        """Check -> detail, for checks that passed."""
        return self._with("passed")

    @property
    def skipped(self) -> dict[str, str]:
        """Check -> reason, for checks that were skipped."""
        return self._with("skipped")

    @property
    def failed(self) -> dict[str, str]:
        """Check -> reason, for checks that failed."""
        return self._with("failed")

    def _with(self, status: str) -> dict[str, str]:
        return {o.check: o.detail for o in self.outcomes if o.status == status}

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self._with(s))} {s}" for s in ("passed", "skipped", "failed"))
        lines = [f"{self.pass_name}: {counts}"]
        lines += [f"  {o.status:<8} {o.check:<10} {o.seconds:5.1f} s  {o.detail}" for o in self.outcomes]
        return "\n".join(lines)
