"""Small modules for capture tests, and factories for `py:` references."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(torch.relu(self.up(x))))


class Frozen(nn.Module):
    """`first` runs under no_grad, with an inner region whose autocast is off."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            hidden = self.first(x)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
                hidden = torch.relu(hidden)
        return {"out": self.second(hidden), "hidden": hidden}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


class Baked(nn.Module):
    """Multiplies by the batch size as a number: the capture holds for one batch size only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(x.shape[0])


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class Hinted(nn.Module):
    """Reads the example's batch size past the guards: right for that size only, and nothing says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        return x * (rows.node.hint if isinstance(rows, torch.SymInt) else rows)


class AutocastOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.lin(x)


class Keywords(nn.Module):
    """Takes what it is not declared to take, as transformers models do."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return x + kwargs["bias"]


def make(width: int = 4) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Mlp(width), (torch.randn(3, width),)


def make_dynamic() -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    return Mlp(), {"x": torch.randn(2, 5, 4)}, {"x": {0: "batch", 1: "seq"}}


def make_broken() -> None:
    raise ValueError("no such file")


def make_wrong() -> int:
    return 3


number = 3
