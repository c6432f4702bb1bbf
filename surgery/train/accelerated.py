"""accelerate's part in a training: making its Accelerator, letting go of it, and what cannot be had with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from surgery.common.errors import MissingExtraError, TrainingError
from surgery.engine.program import Program
from surgery.train.objective import OnPolicy
from surgery.train.options import Settings
from surgery.train.runner import Body


def accelerator(settings: Settings) -> Any:
    """accelerate's own, for what was started. Raises MissingExtraError, TrainingError."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ModuleNotFoundError:
        raise MissingExtraError("accelerate", "train") from None
    # What trains may change along a schedule, or be a head that a batch leaves out.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # It looks for processes on CPUs only where it is told to.
    cpu = not torch.accelerator.is_available()
    made = Accelerator(mixed_precision=settings.precision, cpu=cpu, kwargs_handlers=[unused])
    if made.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise TrainingError(
            f"started as one of {os.environ['WORLD_SIZE']} processes, of which accelerate makes {made.num_processes}; "
            f"see `accelerate env`"
        )
    # Accelerate would train in fp32 and not say so.
    if settings.precision == "fp16" and made.device.type == "cpu":
        let_go(made)
        raise TrainingError("--precision fp16 needs a GPU; on a CPU use --precision bf16")
    return made


def let_go(accelerator: Any) -> None:
    """Leave accelerate's state to nobody: another training may want another precision."""
    accelerator.free_memory()
    type(accelerator.state)._reset_state()


def check_shards(body: Body, program: Program, penalties: Sequence[Any]) -> None:
    """Raises TrainingError for what acts on whole parameters, where these are shards."""
    if not body.sharded:
        return
    schedule = program.schedule
    for what, there in (
        ("a schedule that changes what trains", schedule.changes),
        ("parameters of which some values train", schedule.masks),
        ("a pass that changes its tensors as the training goes on", body.module.__dict__["_paced"]),
        ("--regularize", penalties),
    ):
        if there:
            raise TrainingError(
                f"{what} needs whole parameters, and fully sharded ones are in parts; train with data parallelism"
            )


def check_on_policy(objective: OnPolicy, settings: Settings) -> None:
    """Raises TrainingError for settings of the descent of a loss."""
    for what, given in (
        ("--accumulate", settings.accumulate > 1),
        ("--regularize", bool(settings.regularize)),
        (f"--precision {settings.precision}", settings.precision != "no"),
    ):
        if given:
            raise alone(objective, what)


def alone(objective: OnPolicy, what: str) -> TrainingError:
    """What is said where an objective that learns from what the program does is asked for what it cannot have."""
    return TrainingError(
        f"objective {objective.name!r} learns from what the program does, in one process and in the precision of its "
        f"weights; leave out {what}"
    )
