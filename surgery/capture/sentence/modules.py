"""Modules of sentence-transformers as plain torch modules, and the encoder that runs them one after another.

They compute what the library's modules of the same names compute, on tensors instead of dicts, so that torch.export can
capture them. State dicts have the library's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING = "sentence_embedding"
TOKENS = "token_embeddings"
HIDDEN = "last_hidden_state"  # the name of the tokens' output in the ONNX files that the library reads

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ACTIVATIONS = (
    "ELU", "GELU", "Hardswish", "Identity", "LeakyReLU", "Mish", "ReLU", "ReLU6", "SELU", "Sigmoid", "SiLU", "Softplus",
    "Softsign", "Tanh",
)  # fmt: skip


class Stage(Protocol):
    """A module that reads one feature and writes one.

    Attributes:
        source: name of the feature that it reads.
        target: name of the feature that it writes.
    """

    source: str
    target: str

    def __call__(self, value: Tensor, mask: Tensor) -> Tensor: ...


class Pooling(nn.Module):
    """Pools the vectors of tokens (batch × tokens × features) to one vector per row.

    With several modes, their vectors are joined. Padding may be on either side.
    """

    source, target = TOKENS, EMBEDDING

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        """Pool tokens.

        Args:
            value: batch × tokens × features.
            mask: batch × tokens, 1 for a token and 0 for padding.
        """
        return torch.cat([_POOLED[mode](value, mask) for mode in self.modes], -1)

    def extra_repr(self) -> str:
        return ", ".join(self.modes)


def _wide(value: Tensor) -> torch.dtype:
    """The dtype that sums are made in."""
    return torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype


def _token(value: Tensor, place: Tensor) -> Tensor:
    """The vector of one token of each row."""
    index = place.to(torch.int64)[:, None, None].expand(-1, 1, value.shape[-1])
    return value.gather(1, index).squeeze(1)


def _first(value: Tensor, mask: Tensor) -> Tensor:
    return _token(value, mask.to(torch.int32).argmax(1))


def _last(value: Tensor, mask: Tensor) -> Tensor:
    back = mask.to(torch.int32).flip(1).argmax(1)
    return _token(value * mask.unsqueeze(-1).to(value.dtype), value.shape[1] - 1 - back)


def _max(value: Tensor, mask: Tensor) -> Tensor:
    return value.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(value.dtype)
    total = (value * weights).sum(1, dtype=_wide(value))
    return (total / weights.sum(1, dtype=_wide(value)).clamp(min=1e-9)).to(value.dtype)


def _mean_of_root(value: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(value.dtype)
    total = (value * weights).sum(1, dtype=_wide(value))
    return (total / weights.sum(1, dtype=_wide(value)).clamp(min=1e-9).sqrt()).to(value.dtype)


def _weighted_mean(value: Tensor, mask: Tensor) -> Tensor:
    """The mean with the position of a token, from 1 on, as its weight. Padding on the left is not counted."""
    places = torch.arange(1, value.shape[1] + 1, device=value.device, dtype=_wide(value))[None, :, None]
    places = places - mask.to(torch.int32).argmax(1).view(-1, 1, 1)
    weights = mask.unsqueeze(-1).to(_wide(value)) * places
    return ((value * weights).sum(1) / weights.sum(1).clamp(min=1e-9)).to(value.dtype)


_POOLED = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_of_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


class Dense(nn.Module):
    """A linear layer with an activation, and optionally a residual connection."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: str = "Tanh",
        residual: bool = False,
        source: str = EMBEDDING,
        target: str | None = None,
    ) -> None:
        """Make the layer.

        Args:
            in_features: size of the input.
            out_features: size of the output.
            bias: add a bias.
            activation: name of a class in torch.nn, one of ACTIVATIONS.
            residual: add the input, through a linear layer if the sizes differ.
            source: name of the feature to read.
            target: name of the feature to write; None: the same.
        """
        super().__init__()
        self.source, self.target = source, target or source
        self.linear = nn.Linear(in_features, out_features, bias)
        self.activation_function = getattr(nn, activation)()
        self.adds = residual
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        """Project vectors (… × features)."""
        made = self.activation_function(self.linear(value))
        if not self.adds:
            return made
        return made + (self.residual(value) if hasattr(self, "residual") else value)


class LayerNorm(nn.Module):
    """A layer norm over the features of the embedding."""

    source = target = EMBEDDING

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        """Normalize the features of each row."""
        return self.norm(value)


class Dropout(nn.Module):
    """A dropout of the embedding, active in training."""

    source = target = EMBEDDING

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropout_layer = nn.Dropout(rate)

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        """Drop features of each row."""
        return self.dropout_layer(value)


class Normalize(nn.Module):
    """Scales vectors to the length 1."""

    def __init__(self, source: str = EMBEDDING, target: str | None = None) -> None:
        super().__init__()
        self.source, self.target = source, target or source

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        """Scale vectors along their last axis."""
        return F.normalize(value, dim=-1)


class SentenceEncoder(nn.Module):
    """A transformers model and the stages after it: from tokens to one embedding for each text.

    Attributes:
        transformer: the transformers model.
        stages: names of the submodules after it, in their order.
        reads: name of the transformers output that the stages read.
        writes: name of the feature that it becomes.
        with_tokens: also return the output of the transformers model, as HIDDEN.
    """

    def __init__(
        self,
        transformer: nn.Module,
        stages: Mapping[str, nn.Module],
        reads: str = HIDDEN,
        writes: str = TOKENS,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.stages = tuple(stages)
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.reads, self.writes = reads, writes
        self.with_tokens = False

    @property
    def config(self) -> Any:
        """The configuration of the transformers model."""
        return self.transformer.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embed texts.

        Args:
            input_ids: batch × tokens.
            attention_mask: batch × tokens, 1 for a token and 0 for padding; None: all are tokens.
            token_type_ids: batch × tokens, for models that have them.

        Returns:
            `sentence_embedding`, batch × features.
        """
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        hidden = self.transformer(input_ids=input_ids, return_dict=True, **more)[self.reads]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        features = {self.writes: hidden}
        for name in self.stages:
            stage = cast(Stage, getattr(self, name))
            features[stage.target] = stage(features[stage.source], mask)
        found = {EMBEDDING: features[EMBEDDING]}
        return {HIDDEN: hidden, **found} if self.with_tokens else found
