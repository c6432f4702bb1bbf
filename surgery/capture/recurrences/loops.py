"""Recurrences that transformers' models compute by a loop in a method, as `linear_attention` ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.capture.recurrences.operators import linear_attention


def rg_lru(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """RG-LRU of RecurrentGemma (De et al. 2024, arXiv:2402.19427): `RecurrentGemmaRglru._rnn_scan`.

    Each channel is a head with a key and a value of width 1.
    """
    gate = (recurrent_gate * ~reset).to(acc_dtype)
    # A gate of zero has no logarithm. The smallest positive number forgets as much.
    decay = gate.clamp(min=torch.finfo(acc_dtype).tiny).log().unsqueeze(-1)
    one = torch.ones_like(decay[:, :, :1])
    start = None if recurrent_states is None else recurrent_states.to(acc_dtype)[..., None, None]
    values = hidden_states.to(acc_dtype).unsqueeze(-1)
    out, last = linear_attention(one, one, values, decay, None, start, "gated", 1.0)
    return out.squeeze(-1).to(hidden_states.dtype), last[..., 0, 0]


def lightning(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Lightning attention of MiniMax (arXiv:2501.08313): `MiniMaxLightningAttention.forward` without a cache.

    The decay is a constant of each head.
    """
    batch, steps, _ = hidden_states.shape
    states = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        states = (states * attention_mask[:, :, None]).to(states.dtype)
    states = states.reshape(batch, steps, self.num_attention_heads, 3 * self.head_dim)
    query, key, value = torch.split(states, self.head_dim, dim=3)
    decay = -self.slope_rate.reshape(1, 1, -1).expand(batch, steps, -1)
    out, last = linear_attention(query, key, value, decay, None, None, "gated", 1.0)
    out = self.norm(out.reshape(batch, steps, self.num_attention_heads * self.head_dim))
    out = F.sigmoid(self.output_gate(hidden_states)) * out
    return self.out_proj(out), last


# Class name -> method -> function.
METHODS: dict[str, dict[str, Any]] = {
    "RecurrentGemmaRglru": {"_rnn_scan": rg_lru},
    "MiniMaxLightningAttention": {"forward": lightning},
}
