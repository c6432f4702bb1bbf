"""Options of passes that change gradually during training: first step, last step, and steps between two changes."""

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
    """Check the schedule options of a pass.

    Args:
        pass_: A pass with the options schedule, begin, end, every and unit.
        kind: Kind of schedule that the error suggests.
        also: Further options of the pass that require a schedule.

    Raises:
        PassError: An option requires a schedule and none is given, or a schedule does not end after its begin.
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
    """The schedule of a pass with these options, or None if it has none.

    Args:
        pass_: A pass with the options schedule, begin, end, every and unit.
        value: Function step -> progress.
        apply: Function that changes the pass's tensors; see Gradual.
    """
    if pass_.schedule is None:
        return None
    return Gradual((pass_.begin, pass_.end + 1), pass_.unit, value, apply)


def progress(pass_: Any, step: int) -> float:
    """Progress of a pass's schedule at a step, from 0 to 1.

    Args:
        pass_: A pass with the options begin, end and every.
        step: Number of the step.
    """
    if step < pass_.begin:
        return 0.0
    at = pass_.end if step >= pass_.end else step - (step - pass_.begin) % pass_.every
    return float((at - pass_.begin) / (pass_.end - pass_.begin))
