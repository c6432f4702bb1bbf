"""A short plain training loop, for tests that a program learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import surgery


def falling_loss(
    program: surgery.Program, args: Sequence[Any], classes: int, steps: int = 40, lr: float = 1e-2
) -> list[float]:
    """Losses of a few steps of Adam towards random classes, for the trainable parameters."""
    module = program.module().train()
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(program.parameter_groups(lr))
    losses, truth = [], None
    for _ in range(steps):
        found = module(*args)
        logits: Tensor = next(iter(found.values())) if isinstance(found, dict) else found
        logits = logits.flatten(1, -2).mean(1) if logits.dim() > 2 else logits
        truth = torch.randint(0, classes, logits.shape[:1], generator=generator) if truth is None else truth
        loss = F.cross_entropy(logits, truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    module.eval()
    return losses
