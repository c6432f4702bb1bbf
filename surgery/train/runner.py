"""What runs in training: the live transformers model where it can hold the program's passes, else the graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from surgery.capture.hf import configs
from surgery.common.errors import SurgeryError, TrainingError
from surgery.engine.module import ProgramModule, get
from surgery.engine.program import Program
from surgery.live.state import is_shard, state_of
from surgery.train.unflattened import Unflattened

Form = Literal["auto", "live", "graph"]


class Body:
    """module: the program's graph, which keeps its schedule. model: what is trained, over the same parameters: the live
    model or `module`. note: why it is not the live model, where that was to be expected.

    Where the model's tensors are not the program's own (shards of several processes, buffers on another device), `pull`
    brings their values into the program and `push` takes them back; every process has to call these.
    """

    def __init__(self, program: Program, form: Form = "auto", checkpointing: bool = False) -> None:
        self.program = program
        self.module: ProgramModule = program.module()
        self.model: nn.Module = self.module
        self.note = ""
        transformer = program.base.loaded.config is not None
        if form == "live" or (form == "auto" and transformer):
            try:
                self.model = _live(program)
            except SurgeryError as error:
                if form == "live":
                    raise TrainingError(f"--form live: {error}") from None
                self.note = f"trains as the graph, since {error}"
        if checkpointing:
            self._checkpoint()

    def _checkpoint(self) -> None:
        enable: Any = getattr(self.model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise TrainingError(
                "gradient checkpointing is the live transformers model's; this program trains as its graph"
                + (f" ({self.note})" if self.note else "")
            )
        try:
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise TrainingError(f"gradient checkpointing: {error}") from None

    @property
    def form(self) -> str:
        return "graph" if isinstance(self.model, (ProgramModule, Unflattened)) else "live"

    def unflatten(self) -> None:
        """Let a graph be trained by the modules that it came from: units for fully sharded training."""
        if self.model is self.module:
            self.model = Unflattened(self.module)

    @property
    def sharded(self) -> bool:
        """Whether the model's parameters are shards of several processes."""
        return any(is_shard(parameter) for parameter in self.model.parameters())

    @torch.no_grad()
    def pull(self, names: Collection[str]) -> dict[str, Tensor]:
        """Let the program have the model's values of tensors, where these are others; returns the program's."""
        owned = {}
        for name, there, own in self._places(names):
            if there is not own:
                own.copy_(there.full_tensor() if is_shard(there) else there)
            owned[name] = own
        return owned

    @torch.no_grad()
    def push(self, names: Collection[str]) -> None:
        """Let the model have the program's values of tensors, where these are others."""
        for _, there, own in self._places(names):
            if there is not own:
                there.copy_(shard_like(own, there))

    def _places(self, names: Collection[str]) -> Iterator[tuple[str, Any, Tensor]]:
        """Name, what stands in the model, and the program's tensor."""
        _reshard(self.model)
        owned = {**self.program.changed, **self.program.tensors}
        state = state_of(self.model)
        at = state.places(self.program) if state else {}
        for name in names:
            yield name, get(self.model, at.get(name, name)), owned[name]


def _live(program: Program) -> nn.Module:
    """The live model. Raises SurgeryError where training it would not be training the program."""
    for module in program.base.loaded.module.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise TrainingError(
                f"the running statistics of a {type(module).__name__} move in training, and the live model has the "
                f"base's own"
            )
    if program.module().__dict__["_paced"]:
        raise TrainingError("a pass changes its tensors as the training goes on, which a graph alone follows")
    model: Any = program.live()
    for config in configs(model.config) if hasattr(model, "config") else ():
        config.use_cache = False  # a cache is of no use here, and checkpointing refuses it
    return model


def _reshard(model: nn.Module) -> None:
    """Let the parameters be the shards again: what a forward pass has gathered may still stand in their place, and a
    value that is put there is not what the optimiser moves."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_like(whole: Tensor, like: Any) -> Any:
    """A tensor in the shards of another; as it is where that is in none."""
    if not is_shard(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.detach().to(like.device), like.device_mesh, like.placements)
