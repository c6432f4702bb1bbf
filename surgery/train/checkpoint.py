"""Checkpoints of a run: one directory each, written under a temporary name and then renamed.

Tensors are stored as safetensors, everything else as JSON.

    run.json                    identity of the run: objective, settings, program and data
    log.jsonl                   the training log
    step-00000120/              weights.safetensors, optimizer.safetensors, state.json

The newest directory is the last checkpoint. A run can be resumed only if its identity is unchanged. No generator
state is saved: order, dropout and masks are drawn from the seed and the step, and the learning rate is a function of
the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.common.errors import SurgeryError, TrainingError
from surgery.common.files import staged_directory, write_text
from surgery.common.readers import first_line, read_json, read_tensors
from surgery.engine.program import Program
from surgery.engine.schema import Natural
from surgery.live.places import is_shard
from surgery.train.runner import Body, shard_like

RUN, LOG = "run.json", "log.jsonl"
_REMEDY = "remove the checkpoint, or leave out --resume"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of AdamW
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass
class State:
    """Progress of a run, saved with each checkpoint.

    Attributes:
        step: number of finished steps.
        best: step of the best evaluation, or None.
        score: metric of the best evaluation.
        stale: evaluations since the best one.
        scaler: state of the gradient scaler (fp16 only).
        kept: numbers that an on-policy objective carries from step to step.
    """

    step: int = 0
    best: int | None = None
    score: float | None = None
    stale: int = 0
    scaler: dict[str, Any] | None = None
    kept: dict[str, float] = field(default_factory=dict)


class Weights:
    """All tensors that training changes.

    These are the program's trained parameters, buffers, tensors that gradual passes change, and the tensors an
    objective learns itself.
    """

    def __init__(
        self, program: Program, body: Body | None = None, learned: Mapping[str, Tensor] | None = None
    ) -> None:
        """Collect the tensors.

        Args:
            program: program being trained.
            body: module that runs in training (default: the program's graph).
            learned: tensors an objective trains beside the program, by checkpoint name.
        """
        self.program, self.body = program, body or Body(program, "graph")
        self.learned = dict(learned or {})
        paced = {
            full
            for each in self.body.module.__dict__["_paced"]
            for record in each.sites
            for full in record.tensors.values()
        }
        # A tensor that a pass has replaced, such as the full weight of a pruned filter, is not in the module.
        module = self.body.module
        read = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        read.update(name for name, _ in module.named_buffers(remove_duplicate=False))
        held = {**program.changed, **program.tensors}
        self.names = [
            name
            for name, tensor in held.items()
            if name in read
            and (
                name in paced
                or (program.trains(name) if isinstance(tensor, nn.Parameter) else name in program.changed)
            )
        ]

    def now(self) -> dict[str, Tensor]:
        """Copy the tensors to the CPU. Every process must call this if parameters are sharded."""
        held = {**self.body.pull(self.names), **self.learned}
        return {name: _copied(tensor) for name, tensor in held.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor], path: Path | None = None) -> None:
        """Write values into the program, into the running module, and into the objective's learned tensors.

        Args:
            values: values by name.
            path: file of the values, for the error.

        Raises:
            TrainingError: a value is missing, or has another shape or dtype; nothing is written then.
        """
        held = {**self.program.changed, **self.program.tensors}
        for name, own in {**{n: held[n] for n in self.names}, **self.learned}.items():
            value = values.get(name)
            if value is None or value.shape != own.shape or value.dtype != own.dtype:
                has = "nothing" if value is None else f"{value.dtype} {tuple(value.shape)}"
                raise TrainingError(
                    f"{path or 'the checkpoint'} holds {has} for {name}, and the program has {own.dtype} "
                    f"{tuple(own.shape)}; {_REMEDY}"
                )
        for name in self.names:
            held[name].copy_(values[name])
        for name, tensor in self.learned.items():
            tensor.copy_(values[name])
        self.body.push(self.names)


class Checkpoints:
    """The checkpoints of one run, in its directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal() and f"{int(name):08d}" == name)

    @property
    def begun(self) -> bool:
        """True if there is a checkpoint after the start. That of the start alone holds nothing to continue."""
        return any(self.steps())

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def clear(self) -> None:
        """Delete all checkpoints. The log stays."""
        for step in self.steps():
            shutil.rmtree(self.path(step))

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Write the identity of the run."""
        write_text(self.folder / RUN, json.dumps(identity, indent=1))

    def check_same(self, identity: Mapping[str, Any]) -> None:
        """Check that the run in the directory has this identity.

        Raises:
            TrainingError: there is no run, or a part of its identity differs.
        """
        if not (self.folder / RUN).is_file():
            raise TrainingError(f"{self.folder} contains no run to resume; leave out --resume")
        known = read_json(self.folder / RUN, TrainingError, "leave out --resume")
        if not isinstance(known, dict):
            raise TrainingError(f"{self.folder / RUN} describes no run; leave out --resume")
        for part, values in json.loads(json.dumps(identity)).items():
            before = known.get(part)
            if values == before:
                continue
            if not (isinstance(values, dict) and isinstance(before, dict)):
                raise TrainingError(
                    f"the run to resume used another {part}; use the same, or leave out --resume"
                )
            name = next(n for n in {**before, **values} if values.get(n) != before.get(n))
            raise TrainingError(
                f"the run to resume used {part} {name[:100]}={repr(before.get(name))[:200]}, not "
                f"{repr(values.get(name))[:200]}; use the "
                f"same, or leave out --resume"
            )

    def write(self, state: State, weights: Weights, optimizer: Any, writes: bool = True) -> None:
        """Write a checkpoint, then delete all others except the best.

        Args:
            state: progress of the run.
            weights: tensors to save.
            optimizer: optimizer whose moments are saved.
            writes: True if this process writes the files. With shards every process must still call this to gather
                them.
        """
        path = self.path(state.step)
        now, moments = weights.now(), dict(_moments(optimizer))
        if not writes:
            return
        if path.exists():  # left by a run that stopped between its last write and its cleanup
            shutil.rmtree(path)
        with staged_directory(path) as folder:
            save_file(now, folder / WEIGHTS)
            save_file(moments, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(asdict(state)))
        for step in self.steps():
            if step not in (state.step, state.best):
                shutil.rmtree(self.path(step))

    def read(self, weights: Weights, optimizer: Any) -> State:
        """Restore the last checkpoint.

        Returns:
            The saved state, or a state at step 0 if there is no checkpoint yet.

        Raises:
            TrainingError: the checkpoint cannot be read.
        """
        steps = self.steps()
        if not steps:
            return State()
        path = self.path(steps[-1])
        try:
            state = _state(path, steps)
            values = read_tensors(path / WEIGHTS, TrainingError, _REMEDY)
            moments = read_tensors(path / OPTIMIZER, TrainingError, _REMEDY)
            _check_moments(optimizer, moments, path / OPTIMIZER)
            weights.put(values, path / WEIGHTS)
            _put_moments(optimizer, moments)
        except SurgeryError:
            raise
        except Exception as error:  # the boundary: whatever else an edited checkpoint holds
            raise TrainingError(
                f"the checkpoint {path} cannot be read ({first_line(error)}); remove it"
            ) from None
        return state

    def weights_of(self, step: int) -> dict[str, Tensor]:
        """Load the weights of a checkpoint."""
        return read_tensors(self.path(step) / WEIGHTS, TrainingError, _REMEDY)


class _Stored(BaseModel):
    """The types of a stored state."""

    model_config = ConfigDict(extra="forbid")

    step: Natural
    best: Natural | None = None
    score: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    stale: Natural = 0
    scaler: dict[StrictStr, Annotated[float, Field(strict=True)]] | None = None
    kept: dict[StrictStr, Annotated[float, Field(strict=True)]] = {}


def _state(path: Path, steps: Sequence[int]) -> State:
    """The state of the last checkpoint. Raises TrainingError if it is not one that a run wrote."""
    data = read_json(path / STATE, TrainingError, _REMEDY)
    try:
        _Stored.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))[:100]
        raise TrainingError(f"{path / STATE} cannot be read: {where}: {problem['msg']}; {_REMEDY}") from None
    state = State(**data)
    if state.step != steps[-1] or state.best not in (None, *steps):
        raise TrainingError(f"{path / STATE} is of another step, or its best checkpoint is gone; {_REMEDY}")
    return state


def _check_moments(optimizer: Any, stored: Mapping[str, Tensor], path: Path) -> None:
    """Check that moments belong to the optimizer's parameters. Raises TrainingError."""
    parameters = dict(_named(optimizer))
    for full, value in stored.items():
        key, _, name = full.partition(":")
        parameter = parameters.get(name)
        if parameter is None or key not in _MOMENTS or (value.dim() and value.shape != parameter.shape):
            raise TrainingError(
                f"{path} holds {full[:200]!r} {tuple(value.shape)}, which is no state of this optimizer; {_REMEDY}"
            )


def _named(optimizer: Any) -> Iterable[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _moments(optimizer: Any) -> Iterable[tuple[str, Tensor]]:
    for name, parameter in _named(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}:{name}", _copied(value.full_tensor() if is_shard(value) else value)


def _put_moments(optimizer: Any, stored: Mapping[str, Tensor]) -> None:
    parameters = dict(_named(optimizer))
    for full, value in stored.items():
        key, _, name = full.partition(":")  # a name may contain more colons
        parameter = parameters[name]
        if not value.dim():  # AdamW keeps its step counter on the CPU
            optimizer.state[parameter][key] = value.clone()
        else:  # moments have the device of their parameter, and its shards
            optimizer.state[parameter][key] = shard_like(value.clone().to(parameter.device), parameter)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
