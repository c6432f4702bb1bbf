"""Configurations of small transformers models, for tests that need one of a known shape."""

from __future__ import annotations

from transformers import GPT2Config, LlamaConfig, T5Config


def llama() -> LlamaConfig:
    """Two layers with grouped keys."""
    return LlamaConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def t5() -> T5Config:
    return T5Config(
        vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
