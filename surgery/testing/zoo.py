"""Small models of the kit's own, in fp64: fused and transposed projections, a layer that runs twice, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.capture import Captured, LoadedModel, from_module, trace
from surgery.common.plugins import Plugins
from surgery.engine.base import Base
from surgery.engine.program import Program

_WIDTH, _HEADS, _WORDS = 8, 2, 13


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is stored in × out."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(into, out)), nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.bias.shape[0])


class Attention(nn.Module):
    """Self-attention with one fused projection; it also returns what the projection computes."""

    def __init__(self, linear: type[nn.Module]) -> None:
        super().__init__()
        self.fused, self.proj = linear(_WIDTH, 3 * _WIDTH), linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.fused(x)
        q, k, v = (t.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for t in fused.split(_WIDTH, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), fused


class Language(nn.Module):
    """Tokens: an embedding, a fused transposed projection, transposed MLP layers, a layer that runs twice, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(_WORDS, _WIDTH), nn.LayerNorm(_WIDTH)
        self.attn, self.up, self.down = Attention(Conv1D), Conv1D(_WIDTH, 12), Conv1D(12, _WIDTH)
        self.twice, self.head = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WORDS)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        mixed, fused = self.attn(self.norm(x))
        x = x + mixed
        x = x + self.down(F.gelu(self.up(x)))
        x = self.twice(F.silu(self.twice(x)))
        return self.head(x), fused


class Image(nn.Module):
    """Pixels: convolutions (grouped, transposed), batch norm, a fused linear projection over positions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, _WIDTH, 3, padding=1), nn.BatchNorm2d(_WIDTH)
        self.grouped = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, groups=2)
        self.wider = nn.ConvTranspose2d(_WIDTH, _WIDTH, 2, 2)
        self.attn, self.head = Attention(nn.Linear), nn.Linear(_WIDTH, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.silu(self.norm(self.first(x)))
        x = self.wider(F.silu(self.grouped(x)))
        positions = x.flatten(2).transpose(1, 2)
        mixed, fused = self.attn(positions)
        return self.head((positions + mixed).mean(1)), fused


def _inputs_of_language() -> Tensor:
    return torch.randint(0, _WORDS, (3, 5))


def _inputs_of_image() -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64)


MODELS: dict[str, tuple[type[nn.Module], Callable[[], Any]]] = {
    "language": (Language, _inputs_of_language),
    "image": (Image, _inputs_of_image),
}


def zoo_program(name: str, plugins: Plugins) -> Program:
    """A program of one of MODELS, with random weights and biases; captured once for each process.

    Args:
        name: Key of MODELS.
        plugins: The plugin manager of the program.
    """
    loaded, captured = _captured(name)
    return Program(Base(loaded, captured, plugins))


@cache
def _captured(name: str) -> tuple[LoadedModel, Captured]:
    make, inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().double().eval()
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                fan = tensor[0].numel() if tensor.dim() > 1 else 4
                tensor.data.normal_(0, fan**-0.5)
        for key, buffer in module.named_buffers():
            if key.endswith("running_var"):
                buffer.abs_().add_(0.5)
        loaded = from_module(module, inputs(), copy_module=False)
        return loaded, trace(loaded)
