"""Tiny pipelines of diffusers with random weights, made from configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

KINDS = ("sd", "xl", "sd3", "flux", "wan", "pixart")
_CLIP = {
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "max_position_embeddings": 16, "projection_dim": 32, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98,
}  # fmt: skip


def pipeline(kind: str) -> Any:
    """A pipeline with random weights: sd (Stable Diffusion 1.5), xl, sd3, flux, wan or pixart."""
    import diffusers

    torch.manual_seed(0)
    # Biases and norms start at 0 and 1, where an error in them would not show.
    return _noisy(_MAKERS[kind](diffusers))


def write(kind: str, folder: Path) -> Path:
    """Write a pipeline and return its directory."""
    made = pipeline(kind)
    made.save_pretrained(folder)
    return folder


def read(folder: Path) -> Any:
    """The pipeline in a directory, as a user of diffusers reads it."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    parts = {
        name: None for name in ("tokenizer", "text_encoder") for name in (name, f"{name}_2", f"{name}_3")
    }
    known = getattr(diffusers, index["_class_name"]).__init__.__code__.co_varnames
    absent |= {name: None for name in parts if name in known and name not in index}
    return diffusers.DiffusionPipeline.from_pretrained(folder, **absent)


def image(pipe: Any, seed: int = 0, steps: int = 2, size: int = 16, **options: Any) -> torch.Tensor:
    """An image (or a video) of a pipeline, as numbers from 0 to 1, for one seed and one prompt."""
    kind = type(pipe).__name__
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.Generator().manual_seed(1)

    def text(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn)

    given: dict[str, Any] = {
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "generator": generator,
    }
    if kind.startswith("StableDiffusion3"):
        given |= {"prompt_embeds": text(1, 7, 32), "negative_prompt_embeds": text(1, 7, 32)}
        given |= {"pooled_prompt_embeds": text(1, 64), "negative_pooled_prompt_embeds": text(1, 64)}
    elif kind.startswith("StableDiffusion"):
        given |= {"prompt": "a red cat", "negative_prompt": "a dog"}
    elif kind.startswith("Flux"):
        given |= {"prompt_embeds": text(1, 7, 32), "pooled_prompt_embeds": text(1, 32)}
    elif kind.startswith("Wan"):
        given |= {"prompt_embeds": text(1, 7, 32), "negative_prompt_embeds": text(1, 7, 32), "num_frames": 5}
    else:
        mask = torch.ones(1, 7)
        given |= {
            "prompt_embeds": text(1, 7, 32),
            "negative_prompt_embeds": text(1, 7, 32),
            "negative_prompt": None,
        }
        given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        given |= {"use_resolution_binning": False}
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        found = pipe(**{**given, "output_type": "pt", **options})
    return found.frames if hasattr(found, "frames") else found.images


def _noisy(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe


def _tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {word: number for number, word in enumerate(words)}
    vocab |= {"<|startoftext|>": 97, "<|endoftext|>": 98}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def _letters() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return _tokenizer(Path(folder))


def _vae(diffusers: Any, channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[16, 32], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=channels, norm_num_groups=8, layers_per_block=1,
        sample_size=32, **options,
    )  # fmt: skip


def _unet(diffusers: Any, text: int, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text, norm_num_groups=8, **options,
    )  # fmt: skip


def _sd(diffusers: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        unet=_unet(diffusers, 32, attention_head_dim=8), vae=_vae(diffusers), scheduler=_ddim(diffusers),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**_CLIP)), tokenizer=_letters(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _xl(diffusers: Any) -> Any:
    config = transformers.CLIPTextConfig(**_CLIP, hidden_act="gelu")
    return diffusers.StableDiffusionXLPipeline(
        unet=_unet(
            diffusers, 64, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
        ),
        vae=_vae(diffusers), scheduler=_ddim(diffusers), text_encoder=transformers.CLIPTextModel(config),
        text_encoder_2=transformers.CLIPTextModelWithProjection(config), tokenizer=_letters(), tokenizer_2=_letters(),
    )  # fmt: skip


def _ddim(diffusers: Any) -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _sd3(diffusers: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=24,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(diffusers, shift_factor=0.06, scaling_factor=1.5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None, text_encoder_2=None,
        text_encoder_3=None, tokenizer=None, tokenizer_2=None, tokenizer_3=None,
    )  # fmt: skip


def _flux(diffusers: Any) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, vae=_vae(diffusers, shift_factor=0.06, scaling_factor=1.5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None, text_encoder_2=None,
        tokenizer=None, tokenizer_2=None,
    )  # fmt: skip


def _wan(diffusers: Any) -> Any:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return diffusers.WanPipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def _pixart(diffusers: Any) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer,
        vae=_vae(diffusers),
        scheduler=_ddim(diffusers),
        text_encoder=None,
        tokenizer=None,
    )


_MAKERS = {"sd": _sd, "xl": _xl, "sd3": _sd3, "flux": _flux, "wan": _wan, "pixart": _pixart}
