"""Options of passes that change something gradually as training goes on: from which step, to which, how often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.gradual import Gradual, GradualPlace

Begin = Annotated[int, Field(ge=0, description="with a schedule: the step at which it begins")]
End = Annotated[int | None, Field(gt=0, description="with a schedule: the step at which it is done")]
Every = Annotated[int, Field(gt=0, description="with a schedule: steps between two changes")]
Unit = Annotated[Literal["step", "epoch"], Field(description="what --begin, --end and --every count")]


def check_ramp(pass_: Any, kind: str, *also: str) -> None:
    """Raises PassError for options of a schedule without one, and for a schedule without an end behind its beginning.

    kind: of the schedule to be asked for. also: options of the pass's own that are for a schedule alone.
    """
    cls: type[RewritePass] = type(pass_)
    if pass_.schedule is not None:
        if pass_.end is None or pass_.end <= pass_.begin:
            raise PassError(
                f"pass {cls.name!r}: a schedule needs an --end after its --begin of {pass_.begin}"
            )
        return
    for option in (*also, "begin", "end", "every", "unit"):
        if getattr(pass_, option) != cls.model_fields[option].default:
            raise PassError(f"pass {cls.name!r}: --{option} is for a schedule; add --schedule {kind}")


def gradual(
    pass_: Any, value: Callable[[int], float], apply: Callable[[int, Sequence[GradualPlace]], None]
) -> Gradual | None:
    """The schedule of a pass with these options, or None where it has none.

    Args:
        pass_: A pass with the options schedule, begin, end, every and unit.
        value: Function step -> progress.
        apply: Function that changes the pass's tensors; see Gradual.
    """
    if pass_.schedule is None:
        return None
    return Gradual((pass_.begin, pass_.end + 1), pass_.unit, value, apply)


def progress(pass_: Any, step: int) -> float:
    """How far its schedule is at a step, from 0 to 1."""
    if step < pass_.begin:
        return 0.0
    at = pass_.end if step >= pass_.end else step - (step - pass_.begin) % pass_.every
    return float((at - pass_.begin) / (pass_.end - pass_.begin))
