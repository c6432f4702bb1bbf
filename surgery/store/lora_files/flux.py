"""Names of Flux's modules in kohya's format, which are those of Black Forest Labs' own code: some are fused."""

from __future__ import annotations

import re
from collections.abc import Iterable

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_AROUND = {
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
# The halves of these rows (scale, shift) are in the other order there.
SWAPPED = ("norm_out.linear",)
_BLOCKS = (
    ("transformer_blocks", "double_blocks", _DOUBLE),
    ("single_transformer_blocks", "single_blocks", _SINGLE),
)
_BLOCK = re.compile(r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.(.+)")


def names(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Paths by the names of kohya's modules; a fused one has all of its parts, also those that are not in `paths`."""
    around = {path: name for name, path in _AROUND.items()}
    tables = {own: (theirs, table) for own, theirs, table in _BLOCKS}
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        if path in around:
            found[around[path]] = (path,)
            continue
        match = _BLOCK.fullmatch(path)
        if match is None:
            found[path.replace(".", "_")] = (path,)
            continue
        own, number, leaf = match.groups()
        theirs, table = tables[own]
        for name, leaves in table.items():
            if leaf in leaves:
                found[f"{theirs}_{number}_{name}"] = tuple(f"{own}.{number}.{each}" for each in leaves)
    return found
