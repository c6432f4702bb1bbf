"""A small residual stack with an embedding, three blocks and a head, for selections by depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Depths: 0 is `embed`, 1 to 3 the blocks, 4 `norm` and `head`."""

    def __init__(self, width: int = 16, classes: int = 10, inputs: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def stack() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Stack(), (torch.randn(6, 64),)


STACK = "py:tests.shared.stacks:stack"


def program() -> surgery.Program:
    return surgery.load(STACK)


def digits(count: int = 400) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data[:count], dtype=torch.float32) / 8 - 1, torch.tensor(data.target[:count])


def bits(program: surgery.Program) -> dict[str, Tensor]:
    """Copies of every tensor, to compare with `torch.equal` later."""
    return {name: tensor.detach().clone() for name, tensor in program.state().items()}


def moved(program: surgery.Program, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that have changed in any bit (the sign of a zero counts too)."""
    now = bits(program)
    return {
        n
        for n in before
        if not torch.equal(now[n].reshape(-1).view(torch.uint8), before[n].reshape(-1).view(torch.uint8))
    }


def depth_of(name: str) -> int:
    head, _, rest = name.partition(".")
    return {"embed": 0, "norm": 4, "head": 4}.get(head) if head != "blocks" else int(rest[0]) + 1


def fit(
    program: surgery.Program, steps: int, lr: float = 1e-2, optimiser=torch.optim.AdamW, data=None, **options
) -> list[float]:
    """A plain loop over digits in the eval graph; `advance` before every step. Returns the losses."""
    x, y = data or digits()
    module = program.module()
    optimiser = optimiser(program.parameter_groups(lr, weight_decay=0.1), **options)
    losses = []
    for step in range(steps):
        module.advance(step)
        optimiser.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses
