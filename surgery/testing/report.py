"""What the conformance kit found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One check. status: passed, skipped or failed. detail: what was seen, or why it was skipped or failed."""

    check: str
    status: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class ConformanceReport:
    """Every check in order. print() it."""

    pass_name: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failed

    @property
    def passed(self) -> dict[str, str]:
        return self._with("passed")

    @property
    def skipped(self) -> dict[str, str]:
        return self._with("skipped")

    @property
    def failed(self) -> dict[str, str]:
        return self._with("failed")

    def _with(self, status: str) -> dict[str, str]:
        return {o.check: o.detail for o in self.outcomes if o.status == status}

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self._with(s))} {s}" for s in ("passed", "skipped", "failed"))
        lines = [f"{self.pass_name}: {counts}"]
        lines += [f"  {o.status:<8} {o.check:<10} {o.seconds:5.1f} s  {o.detail}" for o in self.outcomes]
        return "\n".join(lines)
