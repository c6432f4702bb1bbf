"""Chooses the module that runs in training: the live transformers model if it supports the passes, else the graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from surgery.capture.hf_config import configs
from surgery.common.errors import SurgeryError, TrainingError
from surgery.engine.module import ProgramModule, get
from surgery.engine.program import Program
from surgery.live.places import is_shard
from surgery.live.state import state_of
from surgery.train.unflattened import Unflattened

Form = Literal["auto", "live", "graph"]


class Body:
    """The module that runs in training.

    The running module may hold its own tensors: shards of several processes, or buffers on another device. Then
    `pull` copies their values into the program and `push` copies them back. Every process must call these methods.

    Attributes:
        program: program being trained.
        module: graph of the program. It keeps the schedule.
        model: the running module, over the same parameters: the live model or `module`.
        note: why the live model is not used although the program is a transformers model, or "".
    """

    def __init__(self, program: Program, form: Form = "auto", checkpointing: bool = False) -> None:
        """Make the module that runs.

        Args:
            program: program to train.
            form: "live", "graph", or "auto" (live if the model supports the passes).
            checkpointing: use gradient checkpointing of the live model.

        Raises:
            TrainingError: the form or checkpointing is not available.
        """
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
                self.note = f"trains as its graph, because {error}"
        if checkpointing:
            self._checkpoint()

    def _checkpoint(self) -> None:
        enable: Any = getattr(self.model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise TrainingError(
                "gradient checkpointing needs the live transformers model, but this program trains as its graph"
                + (f" ({self.note})" if self.note else "")
            )
        try:
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise TrainingError(f"gradient checkpointing: {error}") from None

    @property
    def form(self) -> str:
        """ "live" or "graph"."""
        return "graph" if isinstance(self.model, (ProgramModule, Unflattened)) else "live"

    def unflatten(self, device: torch.device) -> None:
        """Regroup a graph into the modules it was captured from. They are the units of fully sharded training.

        Args:
            device: device that the shards will be on.
        """
        if self.model is self.module:
            self.model = Unflattened(self.module, device)

    @property
    def sharded(self) -> bool:
        """True if the parameters of the running module are shards."""
        return any(is_shard(parameter) for parameter in self.model.parameters())

    @torch.no_grad()
    def pull(self, names: Collection[str]) -> dict[str, Tensor]:
        """Copy tensors of the running module into the program.

        Args:
            names: names of the tensors in the program.

        Returns:
            The program's tensors.
        """
        owned = {}
        for name, there, own in self._places(names):
            if there is not own:
                own.copy_(there.full_tensor() if is_shard(there) else there)
            owned[name] = own
        return owned

    @torch.no_grad()
    def push(self, names: Collection[str]) -> None:
        """Copy tensors of the program into the running module.

        Args:
            names: names of the tensors in the program.
        """
        for _, there, own in self._places(names):
            if there is not own:
                there.copy_(shard_like(own, there))

    def _places(self, names: Collection[str]) -> Iterator[tuple[str, Any, Tensor]]:
        """Yield each name with the tensor of the running module and the tensor of the program."""
        _reshard(self.model)
        owned = {**self.program.changed, **self.program.tensors}
        state = state_of(self.model)
        at = state.places(self.program) if state else {}
        for name in names:
            yield name, get(self.model, at.get(name, name)), owned[name]


def _live(program: Program) -> nn.Module:
    """Make the live model.

    Raises:
        SurgeryError: training the live model would differ from training the program.
    """
    for module in program.base.loaded.module.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise TrainingError(
                f"training updates the running statistics of a {type(module).__name__}, and the live model shares "
                f"these with the base"
            )
    if program.module().__dict__["_paced"]:
        raise TrainingError("a pass changes its tensors during training, which only a graph supports")
    model: Any = program.live()
    for config in configs(model.config) if hasattr(model, "config") else ():
        config.use_cache = False  # training needs no KV cache, and gradient checkpointing rejects one
    return model


def _reshard(model: nn.Module) -> None:
    """Release gathered parameters, so that the module holds its shards again.

    After a forward pass FSDP may still expose the gathered parameters. A value written to those would be lost,
    because the optimizer updates the shards.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_like(whole: Tensor, like: Any) -> Any:
    """Distribute a tensor like another one. If that one is not a shard, return the tensor unchanged."""
    if not is_shard(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.detach().to(like.device), like.device_mesh, like.placements)
