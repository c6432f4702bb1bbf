"""The given program with random values where a model is constant: zero biases and norms of one hide faults."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.capture import Captured
from surgery.engine.base import Base
from surgery.engine.program import Program

# Noise of a parameter whose values are all equal, relative to the size of a typical weight.
_NOISE = 0.1


@dataclass
class _Perturbed(Base):
    """A base with other values than the given one, whose capture in train mode it uses: that takes seconds."""

    given: Base | None = None

    def train_capture(self) -> Captured:
        assert self.given is not None
        return self.given.train_capture()


def perturbed(program: Program, seed: int) -> Program:
    """A program whose base has noise in every parameter that is constant, such as a bias of zeros.

    A merge that forgets the bias is right as long as the bias is zero, as it is in every untrained model. The given
    program is returned if passes have been applied to it, since their decisions come from its values, if its weights
    are not in memory, or if none is constant.

    Args:
        program: The program; it is not changed.
        seed: Seed of the noise.
    """
    base = program.base
    if len(program.journal) or not base.in_memory or base.consumed or base.released:
        return program
    generator = torch.Generator().manual_seed(seed + 5)
    fresh: dict[int, nn.Parameter] = {}
    names = []
    for name, tensor in base.loaded.module.named_parameters():
        if tensor.is_floating_point() and tensor.numel() > 1 and _is_constant(tensor):
            noise = torch.randn(tensor.shape, generator=generator) * _NOISE
            value = tensor.detach() + noise.to(tensor)
            fresh[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad)
            names.append(name)
    if not fresh:
        return program
    module = base.loaded.module
    # Tensors with noise are new ones under all their names; all others are shared with the given program.
    memo = {id(t): fresh.get(id(t), t) for t in (*module.parameters(), *module.buffers())}
    loaded = replace(
        base.loaded,
        module=copy.deepcopy(module, memo),
        stored=base.loaded.stored | {alias for name in names for alias in base.names[name]},
    )
    fresh_base = _Perturbed(loaded, base.captured, base.plugins, base.ref, base.options, given=base)
    return type(program)(fresh_base)


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.reshape(-1)[0]).all())
