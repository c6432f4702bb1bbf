"""Small modules of every form of weight, with the inputs to capture them; also `py:` factories for the CLI."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Forms(nn.Module):
    """Every ATen form of a linear map, convolutions with and without groups, an embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 8)
        self.addmm_weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.addmm_bias = nn.Parameter(torch.randn(8))
        self.matmul_weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.transposed = nn.Parameter(torch.randn(8, 8) / 3)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.embed(ids))
        x = torch.addmm(self.addmm_bias, x.view(-1, 8), self.addmm_weight).view(x.shape)
        x = torch.matmul(x, self.matmul_weight) + torch.matmul(x, self.transposed.t())
        x = x + self.conv1(x.transpose(1, 2)).transpose(1, 2)
        image = self.depthwise(self.conv2(x.unsqueeze(1))).mean((1, 2, 3))
        x = self.drop(self.norm(x)) + image[:, None, None]
        return self.head(x)


class Experts(nn.Module):
    """Stacked expert weights, gathered by number: W[i] @ x and x @ W[i]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 16, 8) / 3)
        self.down = nn.Parameter(torch.randn(4, 16, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        best = self.router(x).argmax(-1)
        hidden = torch.bmm(self.up[best], x.unsqueeze(-1)).squeeze(-1)
        return x + torch.bmm(functional.gelu(hidden).unsqueeze(1), self.down[best]).squeeze(1)


class Attention(nn.Module):
    """Fused qkv; interleaved puts q, k and v of one head side by side, as Bloom and GPT-NeoX do."""

    def __init__(self, interleaved: bool = False, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.interleaved, self.heads, self.width = interleaved, heads, width
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        head = self.width // self.heads
        if self.interleaved:
            q, k, v = self.project(x).view(batch, length, self.heads, 3, head).unbind(3)
        else:
            q, k, v = self.project(x).view(batch, length, 3, self.heads, head).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.width))


def forms() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Forms(), (torch.randint(0, 11, (3, 5)),)


def experts() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Experts(), (torch.randn(6, 8),)


def attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Attention(), (torch.randn(3, 5, 8),)


def interleaved() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Attention(interleaved=True), (torch.randn(3, 5, 8),)


def convnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A small convolutional classifier with batch normalisation, whose buffers training changes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 4),
    )  # fmt: skip
    return net, (torch.randn(3, 3, 8, 8),)


def breaks_on_data() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Cannot be captured: Python branches on a value."""

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    return Branching(), (torch.randn(3, 4),)
