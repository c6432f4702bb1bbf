"""Checkpoints of a run: a directory for each, written aside and renamed; tensors are safetensors, the rest JSON.

    run.json                    what the run is: objective, settings, program and data; a resumed one has to be the same
    log.jsonl                   what happened
    step-00000120/              weights.safetensors, optimizer.safetensors, state.json

The newest directory is the last checkpoint. It needs no state of a random generator, because order, dropout and masks
are drawn anew from the seed and the step; the learning rate is a function of the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery.common.errors import TrainingError
from surgery.common.files import staged_directory, write_text
from surgery.engine.program import Program
from surgery.live.state import is_shard
from surgery.train.runner import Body, shard_like

RUN, LOG = "run.json", "log.jsonl"
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass
class State:
    """step: how many are done. best: the step of the best evaluation, and score: its metric. stale: evaluations since
    then. scaler: of the gradient, in fp16. kept: what the objective goes on with."""

    step: int = 0
    best: int | None = None
    score: float | None = None
    stale: int = 0
    scaler: dict[str, Any] | None = None
    kept: dict[str, float] = field(default_factory=dict)


class Weights:
    """All that training changes: in a program what trains, buffers, and tensors that passes change; and beside it the
    tensors that an objective learns."""

    def __init__(
        self, program: Program, body: Body | None = None, learned: Mapping[str, Tensor] | None = None
    ) -> None:
        self.program, self.body = program, body or Body(program, "graph")
        self.learned = dict(learned or {})
        paced = {
            full
            for each in self.body.module.__dict__["_paced"]
            for record in each.sites
            for full in record.tensors.values()
        }
        held = {**program.changed, **program.tensors}
        self.names = [
            name
            for name, tensor in held.items()
            if (program.trains(name) if isinstance(tensor, nn.Parameter) else name in program.changed)
            or name in paced
        ]

    def now(self) -> dict[str, Tensor]:
        """Copies, on the CPU. Of sharded ones every process has to ask."""
        held = {**self.body.pull(self.names), **self.learned}
        return {name: _copied(tensor) for name, tensor in held.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Into the program, into what runs, and into what is learned beside it."""
        held = {**self.program.changed, **self.program.tensors}
        for name in self.names:
            held[name].copy_(values[name])
        for name, tensor in self.learned.items():
            tensor.copy_(values[name])
        self.body.push(self.names)


class Checkpoints:
    """Those of one run, in its directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def clear(self) -> None:
        """Remove them; the log stays."""
        for step in self.steps():
            shutil.rmtree(self.path(step))

    def begin(self, what: Mapping[str, Any]) -> None:
        """Write what the run is."""
        write_text(self.folder / RUN, json.dumps(what, indent=1))

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Raises TrainingError where the run in the directory is another, naming what differs."""
        try:
            known = json.loads((self.folder / RUN).read_text())
        except (OSError, ValueError):
            raise TrainingError(f"{self.folder} holds no run to resume; leave out --resume") from None
        for part, values in json.loads(json.dumps(what)).items():
            before = known.get(part)
            if values == before:
                continue
            if not (isinstance(values, dict) and isinstance(before, dict)):
                raise TrainingError(
                    f"the run to resume had another {part}; give the same, or leave out --resume"
                )
            name = next(n for n in {**before, **values} if values.get(n) != before.get(n))
            raise TrainingError(
                f"the run to resume had {part} {name}={before.get(name)!r}, and not {values.get(name)!r}; give the "
                f"same, or leave out --resume"
            )

    def write(self, state: State, weights: Weights, optimizer: Any, writes: bool = True) -> None:
        """Write a checkpoint, then remove those that are neither this one nor the best.

        writes: whether this process is the one that does; of shards every process gives its own.
        """
        path = self.path(state.step)
        now, moments = weights.now(), dict(_moments(optimizer))
        if not writes:
            return
        if path.exists():  # of a run that was stopped between this and its removal
            shutil.rmtree(path)
        with staged_directory(path) as folder:
            save_file(now, folder / WEIGHTS)
            save_file(moments, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(asdict(state)))
        for step in self.steps():
            if step not in (state.step, state.best):
                shutil.rmtree(self.path(step))

    def read(self, weights: Weights, optimizer: Any) -> State:
        """Put the last checkpoint back; the state at step 0 where there is none yet."""
        steps = self.steps()
        if not steps:
            return State()
        path = self.path(steps[-1])
        try:
            state = State(**json.loads((path / STATE).read_text()))
            weights.put(load_file(path / WEIGHTS))
            _put_moments(optimizer, load_file(path / OPTIMIZER))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise TrainingError(f"the checkpoint {path} cannot be read ({error}); remove it") from None
        return state

    def weights_of(self, step: int) -> dict[str, Tensor]:
        return load_file(self.path(step) / WEIGHTS)


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
        key, _, name = full.partition(":")  # a name may hold another
        parameter = parameters[name]
        if not value.dim():  # AdamW counts its steps on the CPU
            optimizer.state[parameter][key] = value.clone()
        else:  # moments lie beside their parameter, and are in shards where it is
            optimizer.state[parameter][key] = shard_like(value.clone().to(parameter.device), parameter)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
