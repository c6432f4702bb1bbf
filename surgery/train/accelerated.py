"""Creates and releases accelerate's Accelerator, and rejects settings that do not work with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from surgery.capture.devices import HOME, exact
from surgery.common.errors import MissingExtraError, TrainingError
from surgery.engine.program import Program
from surgery.train.objective import OnPolicy
from surgery.train.options import Settings
from surgery.train.runner import Body


def training_device(program: Program, asked: torch.device | None) -> torch.device | None:
    """The device to train on: the one asked for, the program's, or the GPU of this machine.

    Args:
        program: program to train.
        asked: device that the user chose.

    Returns:
        None if there are several processes: accelerate gives each its own device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    found = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if asked is None and program.device == HOME and found is not None and not on_cpu:
        asked = found
    return exact(asked or program.device)


def accelerator(settings: Settings, device: torch.device | None = None) -> Any:
    """Create the Accelerator for the processes that were launched.

    Args:
        settings: options of the loop.
        device: device of a single process, see `training_device`.

    Raises:
        MissingExtraError: accelerate is not installed.
        TrainingError: accelerate formed another number of processes than WORLD_SIZE, or fp16 is asked for on a CPU.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
    except ModuleNotFoundError:
        raise MissingExtraError("accelerate", "train") from None
    # A schedule may freeze parameters, and a batch may not use every head. DDP must not wait for their gradients.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Accelerate forms a process group on CPUs only if `cpu` is set.
    cpu = not torch.accelerator.is_available() or device == HOME
    made = Accelerator(mixed_precision=settings.precision, cpu=cpu, kwargs_handlers=[unused])
    if device is not None and made.device != device:
        # Accelerate knows the first device of a kind; the user may have chosen another.
        PartialState().device = made.state.device = device
    if made.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise TrainingError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate formed {made.num_processes} processes; "
            f"check the setup with `accelerate env`"
        )
    # Accelerate would silently train in fp32.
    if settings.precision == "fp16" and made.device.type == "cpu":
        let_go(made)
        raise TrainingError("--precision fp16 needs a GPU; on a CPU use --precision bf16")
    return made


def let_go(accelerator: Any) -> None:
    """Reset accelerate's global state, so that a later training in this process can use another precision."""
    accelerator.free_memory()
    type(accelerator.state)._reset_state()


def check_shards(body: Body, program: Program, penalties: Sequence[Any]) -> None:
    """Reject features that need whole parameters if the parameters are sharded.

    Args:
        body: the module being trained.
        program: its program, whose schedule is checked.
        penalties: active `--regularize` penalties.

    Raises:
        TrainingError: a schedule, a partly trained parameter, a gradual pass or a penalty meets sharded parameters.
    """
    if not body.sharded:
        return
    schedule = program.schedule
    for feature, there in (
        ("a schedule that changes the trained parameters", schedule.changes),
        ("a parameter with a mask of trained values", schedule.masks),
        ("a pass that changes its tensors during training", body.module.__dict__["_paced"]),
        ("--regularize", penalties),
    ):
        if there:
            raise TrainingError(
                f"{feature} needs whole parameters, but fully sharded training splits them; use data parallelism"
            )


def check_on_policy(objective: OnPolicy, settings: Settings) -> None:
    """Reject settings that apply only to gradient descent on a loss.

    Raises:
        TrainingError: accumulation, penalties or mixed precision are combined with an on-policy objective.
    """
    for feature, given in (
        ("--accumulate", settings.accumulate > 1),
        ("--regularize", bool(settings.regularize)),
        (f"--precision {settings.precision}", settings.precision != "no"),
    ):
        if given:
            raise alone(objective, feature)


def alone(objective: OnPolicy, feature: str) -> TrainingError:
    """Build the error for a setting that on-policy objectives do not support."""
    return TrainingError(
        f"objective {objective.name!r} learns from the program's own actions, in one process and in the precision of "
        f"its weights; leave out {feature}"
    )
