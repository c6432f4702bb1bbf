"""Tiny random models of the families with linear recurrences, by model type of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BASE: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    **_BASE, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MOE: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 16,
    "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_DELTA, **_MOE},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_MOE},
    "olmo_hybrid": {**_DELTA, "linear_num_value_heads": 2},
    "kimi_linear": {**_BASE, **_LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {
        **_BASE, **_LATENT, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "layer_group_size": 2,
        "num_mtp_layers": 0, "routed_scaling_factor": 1.0, "kda_lower_bound": -5.0,
    },
    "mamba2": {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 6,
        "n_groups": 2, "chunk_size": 16, "expand": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "bamba": {**_BASE, **_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_BASE, **_MAMBA2, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_BASE, **_MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 48, "position_embedding_type": "rope",
    },
    "nemotron_h": {
        **_BASE, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 6, "n_groups": 2, "chunk_size": 16, "conv_kernel": 4, "expand": 2,
    },
    "zamba2": {
        **_BASE, "mamba_d_state": 6, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "chunk_size": 16,
        "mamba_expand": 2, "num_mem_blocks": 1, "attention_hidden_size": 64, "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1],
    },
    "mamba": {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "falcon_mamba": {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "recurrent_gemma": {
        **_BASE, "lru_width": 32, "attention_window_size": 16, "conv1d_width": 4,
        "block_types": ["recurrent", "attention"],
    },
    "minimax": {
        **_BASE, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "block_size": 16,
    },
    "jamba": {
        **_BASE, "mamba_d_state": 6, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
}  # fmt: skip


def recurrent_model(model_type: str, seed: int = 0) -> nn.Module:
    """A causal language model whose weights, norms and biases are all random and not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
