"""Names of modules in kohya's format, for each model that it has names for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.engine.program import Program
from surgery.store.lora_files import flux

# Of a module in kohya's file: the paths whose weights it has, one after the other in its rows.
Names = dict[str, tuple[str, ...]]

_OF_RESNET = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_AROUND = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2", "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip
_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)"
)


def kohya_names(program: Program, paths: Iterable[str]) -> Names | None:
    """Paths by kohya's names of modules, without the prefix of the part; None if it has no names for the model.

    Args:
        program: program of the model.
        paths: paths to name.
    """
    model: Any = program.base.loaded.model
    kind = type(model).__name__
    if kind == "FluxTransformer2DModel":
        return flux.names(paths)
    if kind.startswith("CLIPText"):
        return {clip_path(model, path).replace(".", "_"): (path,) for path in paths}
    if kind != "UNet2DConditionModel":
        return None
    if model.config.get("addition_embed_type") == "text_time":
        return {_sgm(path, model.config): (path,) for path in paths}
    return {path.replace(".", "_"): (path,) for path in paths}


def read_names(program: Program, paths: Iterable[str]) -> Names:
    """Paths by all names that a file of kohya's format may have for them, also by the paths with underscores."""
    listed = list(paths)
    plain = {path.replace(".", "_"): (path,) for path in listed}
    return {**plain, **(kohya_names(program, listed) or {})}


def clip_path(model: Any, path: str) -> str:
    """Path in a CLIP text encoder as files have it: transformers 5 has dropped its `text_model`."""
    if not type(model).__name__.startswith("CLIPText") or path.startswith(("text_model.", "text_projection")):
        return path
    return f"text_model.{path}"


def _sgm(path: str, config: Mapping[str, Any]) -> str:
    """Name of a module of Stable Diffusion XL, as Stability's own code has it: blocks are numbered in one row."""
    if path in _AROUND:
        return _AROUND[path]
    found = _BLOCK.fullmatch(path)
    if found is None:
        return path.replace(".", "_")
    layers, number = int(config["layers_per_block"]), int(found["number"])
    kind, rest = found["kind"], found["rest"]
    rest = _OF_RESNET.get(rest, rest.replace(".", "_"))
    if found["side"] is None:
        place = f"middle_block_{1 if kind == 'attentions' else 2 * number}"
    elif found["side"] == "down":
        first = 1 + int(found["block"]) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks_{first + layers}_0_op"
        place = f"input_blocks_{first + number}_{int(kind == 'attentions')}"
    else:
        first = int(found["block"]) * (layers + 1)
        attends = "CrossAttn" in str(config["up_block_types"][int(found["block"])])
        if kind == "upsamplers":
            return f"output_blocks_{first + layers}_{2 if attends else 1}_{rest}"
        place = f"output_blocks_{first + number}_{int(kind == 'attentions')}"
    return f"{place}_{rest}"
