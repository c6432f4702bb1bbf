# ruff: noqa: E501  (one architecture a line where it fits)
"""Tiny random architectures as data: how to build them, and their expected attention weights.

`expected` is the number of distinct attention weights by role, derived from the configuration: `qkv` is a fused
projection, ALBERT's shared layer counts once, DeepSeek's low-rank chains are `q.a`, `q.b`, `kv.a`, `kv.b`. None means
unknown. Models have two layers unless noted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arch:
    """A model type of transformers with small settings, built through an auto class for a task."""

    model_type: str
    task: str
    config: dict[str, Any]
    expected: dict[str, int] | None
    example: dict[str, int] = field(default_factory=dict)


def _sep(n: int) -> dict[str, int]:
    return {"q": n, "k": n, "v": n, "qkv": 0, "out": n}


def _fused(n: int) -> dict[str, int]:
    return {"q": 0, "k": 0, "v": 0, "qkv": n, "out": n}


_NONE = _sep(0)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2, **_TOKENS}
_MOE = {**_LLAMA, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
_GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, **_TOKENS,
}  # fmt: skip
_T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 99,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_WAV: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 32,
    "conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_CLIP_TEXT = {**_BERT, **_TOKENS}

_FILL, _GEN, _CLS, _FEAT = "fill-mask", "text-generation", "text-classification", "feature-extraction"
_S2S, _IMG, _CTC = "text2text-generation", "image-classification", "automatic-speech-recognition"

ARCHITECTURES: dict[str, Arch] = {
    # Encoders
    "bert": Arch("bert", _FILL, _BERT, _sep(2)),
    "bert-classifier": Arch("bert", _CLS, _BERT, _sep(2)),
    "bert-tokens": Arch("bert", "token-classification", _BERT, _sep(2)),
    "bert-answers": Arch("bert", "question-answering", _BERT, _sep(2)),
    "roberta": Arch("roberta", _CLS, _BERT, _sep(2)),
    "xlm-roberta": Arch("xlm-roberta", _FILL, _BERT, _sep(2)),
    "camembert": Arch("camembert", _FILL, _BERT, _sep(2)),
    "distilbert": Arch(
        "distilbert", _CLS,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99, "max_position_embeddings": 64},
        _sep(2),
    ),
    "albert": Arch("albert", _FILL, {**_BERT, "embedding_size": 16}, _sep(1)),
    "electra": Arch("electra", _FILL, {**_BERT, "embedding_size": 16}, _sep(2)),
    "deberta": Arch("deberta", _FILL, {**_BERT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}, None),
    "deberta-v2": Arch(
        "deberta-v2", _FILL, {**_BERT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}, _sep(2)
    ),
    "mpnet": Arch("mpnet", _FILL, _BERT, _sep(2)),
    "modernbert": Arch("modernbert", _FILL, {**_BERT, **_TOKENS, "cls_token_id": 1, "sep_token_id": 2}, _fused(2)),
    "megatron-bert": Arch("megatron-bert", _FILL, _BERT, _sep(2)),
    "rembert": Arch("rembert", _FILL, {**_BERT, "input_embedding_size": 16, "output_embedding_size": 16}, _sep(2)),
    "roformer": Arch("roformer", _FILL, {**_BERT, "embedding_size": 32}, _sep(2)),
    "convbert": Arch("convbert", _FILL, {**_BERT, "embedding_size": 16}, None),
    "mobilebert": Arch(
        "mobilebert", _FILL, {**_BERT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}, _sep(2)
    ),
    "squeezebert": Arch("squeezebert", _FILL, {**_BERT, "embedding_size": 32}, None),
    "nystromformer": Arch("nystromformer", _FILL, {**_BERT, "num_landmarks": 4, "segment_means_seq_len": 64}, None),
    "ernie": Arch("ernie", _FILL, _BERT, _sep(2)),
    "xmod": Arch("xmod", _FILL, {**_BERT, "default_language": "en_XX"}, _sep(2)),
    "data2vec-text": Arch("data2vec-text", _FILL, _BERT, _sep(2)),
    "esm": Arch("esm", _FILL, {**_BERT, "pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"}, _sep(2)),
    "xlm": Arch("xlm", _FILL, {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "n_words": 99,
                               "max_position_embeddings": 64}, _sep(2)),
    "fnet": Arch("fnet", _FILL, _BERT, _NONE),
    "big_bird": Arch("big_bird", _FILL, {**_BERT, "attention_type": "original_full"}, _sep(2)),
    "layoutlm": Arch("layoutlm", _FILL, _BERT, _sep(2)),
    "splinter": Arch("splinter", "question-answering", _BERT, _sep(2)),
    "xlnet": Arch("xlnet", _FEAT, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 99}, None),
    "longformer": Arch("longformer", _FILL, {**_BERT, "attention_window": 4}, None),
    "eurobert": Arch("eurobert", _FILL, _LLAMA, _sep(2)),
    # Decoders
    "gpt2": Arch("gpt2", _GEN, _GPT, _fused(2)),
    "gpt2-classifier": Arch("gpt2", _CLS, _GPT, _fused(2)),
    "openai-gpt": Arch("openai-gpt", _GEN, _GPT, _fused(2)),
    "gpt_neo": Arch(
        "gpt_neo", _GEN,
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]], "window_size": 8, "bos_token_id": 1, "eos_token_id": 2},
        _sep(2),
    ),
    "gpt_neox": Arch("gpt_neox", _GEN, {**_BERT, **_TOKENS}, _fused(2)),
    "gptj": Arch("gptj", _GEN, {**_GPT, "rotary_dim": 4}, _sep(2)),
    "gpt_bigcode": Arch("gpt_bigcode", _GEN, _GPT, _fused(2)),
    "codegen": Arch("codegen", _GEN, {**_GPT, "rotary_dim": 4, "n_ctx": 64}, _fused(2)),
    "opt": Arch("opt", _GEN, {**_BERT, **_TOKENS, "ffn_dim": 64, "word_embed_proj_dim": 32}, _sep(2)),
    "bloom": Arch("bloom", _GEN, {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, **_TOKENS}, _fused(2)),
    "falcon": Arch("falcon", _GEN, {**_BERT, **_TOKENS}, _fused(2)),
    "mpt": Arch("mpt", _GEN, {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64,
                              "vocab_size": 99}, _fused(2)),
    "biogpt": Arch("biogpt", _GEN, {**_BERT, **_TOKENS}, _sep(2)),
    "xglm": Arch("xglm", _GEN, {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "vocab_size": 99,
                                "max_position_embeddings": 64, **_TOKENS}, _sep(2)),
    "ctrl": Arch("ctrl", _GEN, {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64, "n_positions": 64, "vocab_size": 99}, _sep(2)),
    "llama": Arch("llama", _GEN, _LLAMA, _sep(2)),
    "llama-classifier": Arch("llama", _CLS, _LLAMA, _sep(2)),
    "mistral": Arch("mistral", _GEN, {**_LLAMA, "sliding_window": 8}, _sep(2)),
    "mixtral": Arch("mixtral", _GEN, {**_LLAMA, "num_local_experts": 4}, _sep(2)),
    "qwen2": Arch("qwen2", _GEN, _LLAMA, _sep(2)),
    "qwen3": Arch("qwen3", _GEN, {**_LLAMA, "head_dim": 8}, _sep(2)),
    "qwen2_moe": Arch("qwen2_moe", _GEN, {**_MOE, "shared_expert_intermediate_size": 16}, _sep(2)),
    "qwen3_moe": Arch("qwen3_moe", _GEN, _MOE, _sep(2)),
    "gemma": Arch("gemma", _GEN, {**_LLAMA, "head_dim": 8}, _sep(2)),
    "gemma2": Arch("gemma2", _GEN, {**_LLAMA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}, _sep(2)),
    "gemma3": Arch("gemma3_text", _GEN, {**_LLAMA, "head_dim": 8, "sliding_window": 8}, _sep(2)),
    "phi": Arch("phi", _GEN, _LLAMA, _sep(2)),
    "phi3": Arch("phi3", _GEN, _LLAMA, _fused(2)),
    "cohere": Arch("cohere", _GEN, _LLAMA, _sep(2)),
    "cohere2": Arch("cohere2", _GEN, {**_LLAMA, "sliding_window": 8}, _sep(2)),
    "olmo": Arch("olmo", _GEN, _LLAMA, _sep(2)),
    "olmo2": Arch("olmo2", _GEN, _LLAMA, _sep(2)),
    "olmoe": Arch("olmoe", _GEN, {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, _sep(2)),
    "stablelm": Arch("stablelm", _GEN, _LLAMA, _sep(2)),
    "starcoder2": Arch("starcoder2", _GEN, _LLAMA, _sep(2)),
    "granite": Arch("granite", _GEN, _LLAMA, _sep(2)),
    "granitemoe": Arch("granitemoe", _GEN, {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, _sep(2)),
    "nemotron": Arch("nemotron", _GEN, {**_LLAMA, "head_dim": 8}, _sep(2)),
    "glm": Arch("glm", _GEN, {**_LLAMA, "head_dim": 8}, _sep(2)),
    "smollm3": Arch("smollm3", _GEN, _LLAMA, _sep(2)),
    "exaone4": Arch("exaone4", _GEN, {**_LLAMA, "sliding_window": 8}, _sep(2)),
    "arcee": Arch("arcee", _GEN, _LLAMA, _sep(2)),
    "helium": Arch("helium", _GEN, {**_LLAMA, "head_dim": 8}, _sep(2)),
    "persimmon": Arch("persimmon", _GEN, {**_BERT, **_TOKENS}, _fused(2)),
    "gpt_oss": Arch("gpt_oss", _GEN, {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                                      "sliding_window": 8}, _sep(2)),
    "deepseek_v3": Arch(
        "deepseek_v3", _GEN,
        {**_LLAMA, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        {"q.a": 2, "q.b": 2, "kv.a": 2, "kv.b": 2, "out": 2},
    ),
    "mamba": Arch("mamba", _GEN, {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 4}, _NONE),
    "mamba2": Arch(
        "mamba2", _GEN,
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "num_heads": 8, "head_dim": 8, "state_size": 6,
         "n_groups": 2, "chunk_size": 16, "expand": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        _NONE,
    ),
    "qwen3_5": Arch(
        "qwen3_5_text", _GEN,
        {**_LLAMA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6},
        _sep(1),
    ),
    # Encoder-decoders: two self-attentions of the encoder, two self and two cross of the decoder
    "t5": Arch("t5", _S2S, _T5, _sep(6)),
    "mt5": Arch("mt5", _S2S, _T5, _sep(6)),
    "umt5": Arch("umt5", _S2S, _T5, _sep(6)),
    "bart": Arch("bart", _S2S, _BART, _sep(6)),
    "bart-classifier": Arch("bart", _CLS, _BART, _sep(6)),
    "mbart": Arch("mbart", _S2S, _BART, _sep(6)),
    "pegasus": Arch("pegasus", _S2S, _BART, _sep(6)),
    "marian": Arch("marian", _S2S, _BART, _sep(6)),
    "blenderbot": Arch("blenderbot", _S2S, _BART, _sep(6)),
    "m2m_100": Arch("m2m_100", _S2S, _BART, _sep(6)),
    "plbart": Arch("plbart", _S2S, _BART, _sep(6)),
    "whisper": Arch("whisper", _CTC, {**_BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
                    _sep(6)),
    "speech_to_text": Arch("speech_to_text", _CTC, {**_BART, "input_feat_per_channel": 16, "max_source_positions": 64,
                           "max_target_positions": 32, "conv_channels": 16}, _sep(6)),
    # Sound
    "wav2vec2": Arch("wav2vec2", _CTC, _WAV, _sep(2)),
    "hubert": Arch("hubert", _CTC, _WAV, _sep(2)),
    "wavlm": Arch("wavlm", _CTC, _WAV, _sep(2)),
    "unispeech": Arch("unispeech", _CTC, _WAV, _sep(2)),
    "data2vec-audio": Arch("data2vec-audio", _CTC, _WAV, _sep(2)),
    "sew": Arch("sew", _CTC, {**_WAV, "squeeze_factor": 2}, _sep(2)),
    "ast": Arch("audio-spectrogram-transformer", "audio-classification",
                {**_VIT, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 16}, _sep(2)),
    # Images
    "vit": Arch("vit", _IMG, _VIT, _sep(2)),
    "deit": Arch("deit", _IMG, _VIT, _sep(2)),
    "beit": Arch("beit", _IMG, _VIT, _sep(2)),
    "vit_msn": Arch("vit_msn", _IMG, _VIT, _sep(2)),
    "dinov2": Arch("dinov2", _IMG, {**_VIT, "mlp_ratio": 2}, _sep(2)),
    "dinov2_with_registers": Arch("dinov2_with_registers", _IMG, {**_VIT, "mlp_ratio": 2}, _sep(2)),
    "yolos": Arch("yolos", "object-detection", {**_VIT, "image_size": [32, 32], "num_detection_tokens": 4}, _sep(2)),
    "swin": Arch("swin", _IMG, {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
                                "window_size": 4}, _sep(2)),
    "swinv2": Arch("swinv2", _IMG, {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
                                    "num_heads": [2, 4], "window_size": 4}, _sep(2)),
    "convnext": Arch("convnext", _IMG, {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32}, _NONE),
    "convnextv2": Arch("convnextv2", _IMG, {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32}, _NONE),
    "resnet": Arch("resnet", _IMG, {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, _NONE,
                   {"image_size": 64}),
    "regnet": Arch("regnet", _IMG, {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
                                    "groups_width": 8}, _NONE, {"image_size": 64}),
    "mobilenet_v2": Arch("mobilenet_v2", _IMG, {"image_size": 64, "depth_multiplier": 0.25}, _NONE),
    "segformer": Arch("segformer", "image-segmentation", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
                      "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}, _sep(4), {"image_size": 64}),
    "pvt": Arch("pvt", _IMG, {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
                              "image_size": 64}, _sep(4)),
    "poolformer": Arch("poolformer", _IMG, {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, _NONE,
                       {"image_size": 64}),
    "mobilevit": Arch("mobilevit", _IMG, {"image_size": 64, "hidden_sizes": [24, 32, 40], "num_attention_heads": 4,
                                          "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 40]}, None),
    "dpt": Arch("dpt", "depth-estimation", {**_VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16],
                "fusion_hidden_size": 16, "is_hybrid": False}, _sep(4)),
    "videomae": Arch("videomae", "video-classification", {**_VIT, "num_frames": 4, "tubelet_size": 2}, _sep(2)),
    "vilt": Arch("vilt", _FEAT, {**_BERT, "image_size": 32, "patch_size": 8}, _sep(2)),
    # Texts and images: two towers of two layers
    "clip": Arch("clip", _FEAT, {"text_config": _CLIP_TEXT, "vision_config": _VIT, "projection_dim": 16}, _sep(4)),
    "siglip": Arch("siglip", _FEAT, {"text_config": _CLIP_TEXT, "vision_config": _VIT}, None),
    "blip": Arch("blip", _FEAT, {"text_config": {**_CLIP_TEXT, "encoder_hidden_size": 32}, "vision_config": _VIT,
                                 "projection_dim": 16}, None),
    "chinese_clip": Arch("chinese_clip", _FEAT, {"text_config": _CLIP_TEXT, "vision_config": _VIT, "projection_dim": 16},
                         _sep(4)),
}  # fmt: skip

# timm: name → (settings, expected). Full architectures, with fewer blocks or a smaller image where it has them.
_SMALL = {"img_size": 64, "num_classes": 10}
TIMM: dict[str, tuple[dict[str, Any], dict[str, int] | None]] = {
    "vit_tiny_patch16_224": ({**_SMALL, "depth": 2}, _fused(2)),
    "deit_tiny_patch16_224": ({**_SMALL, "depth": 2}, _fused(2)),
    "deit3_small_patch16_224": ({**_SMALL, "depth": 2}, _fused(2)),
    "vit_small_patch14_dinov2": ({"img_size": 56, "depth": 2}, _fused(2)),
    "beit_base_patch16_224": ({**_SMALL, "depth": 2, "embed_dim": 48, "num_heads": 4}, _fused(2)),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 2}, None),
    "cait_xxs24_224": ({**_SMALL, "depth": 2}, None),
    "xcit_nano_12_p8_224": ({**_SMALL, "depth": 2}, None),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 56, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16},
        _fused(2),
    ),
    "swinv2_tiny_window8_256": (
        {"img_size": 64, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16},
        _fused(2),
    ),
    "pvt_v2_b0": ({"num_classes": 10}, None),
    "maxvit_rmlp_pico_rw_256": ({"img_size": 64}, None),
    "levit_128s": ({}, None),
    "convit_tiny": ({**_SMALL, "depth": 2}, None),
    "crossvit_tiny_240": ({}, None),
    "twins_pcpvt_small": ({"img_size": 64}, None),
    "mobilevit_xxs": ({}, None),
    "hiera_tiny_224": ({}, None),
    "mixer_s32_224": ({"num_classes": 10}, _NONE),
    "resmlp_12_224": ({"num_classes": 10}, _NONE),
    "resnet18": ({"num_classes": 10}, _NONE),
    "resnet50": ({"num_classes": 10}, _NONE),
    "convnext_atto": ({"num_classes": 10}, _NONE),
    "efficientnet_b0": ({"num_classes": 10}, _NONE),
    "mobilenetv3_small_050": ({"num_classes": 10}, _NONE),
    "regnety_002": ({"num_classes": 10}, _NONE),
    "densenet121": ({"num_classes": 10}, _NONE),
    "repvgg_a0": ({"num_classes": 10}, _NONE),
    "ghostnet_050": ({"num_classes": 10}, _NONE),
}
