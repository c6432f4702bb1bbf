"""Keys of LoRA files: the part of the pipeline, the module, and the tensor that a key names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from surgery.engine.program import Program

# Models of a pipeline, by the prefixes of keys. UNet and transformer are the main model, which kohya names lora_unet.
PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
MAIN = ("unet", "transformer")
_KOHYA = {
    "lora_unet_": "main", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}  # fmt: skip
_ENDS = re.compile(
    r"(?P<name>.+?)\.(?:"
    r"(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.default)?\.weight(?P<A>)"
    r"|(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)(?:\.default)?\.weight(?P<B>)"
    r"|(?:lora_magnitude_vector|dora_scale)(?:\.default)?(?:\.weight)?(?P<m>)"
    r"|(?:alpha)(?P<alpha>))"
)
# Before 2024 diffusers had the attention's factors in a processor: `attn1.processor.to_q_lora.down.weight`.
_PROCESSOR = re.compile(
    r"(?P<name>.+?)\.(?:processor\.)?(?P<leaf>to_[qkv]|to_out)_lora\.(?P<which>down|up)\.weight"
)


@dataclass(frozen=True)
class Key:
    """A key of a file.

    Attributes:
        part: model of the pipeline: one of PARTS, "main", or "" if the key names none.
        name: path of the module; in kohya's format with underscores for dots.
        tensor: "A", "B", "m" (the magnitudes of DoRA) or "alpha".
        kohya: True for kohya's format.
    """

    part: str
    name: str
    tensor: str
    kohya: bool = False


def parse(key: str) -> Key | None:
    """Parse a key; None if it is no key of a LoRA."""
    old = _PROCESSOR.fullmatch(key)
    if old is not None:
        leaf, name = old["leaf"], old["name"]
        if name.endswith("self_attn"):  # of a CLIP text encoder
            leaf = {"to_out": "out_proj"}.get(leaf, f"{leaf[-1]}_proj")
        elif leaf == "to_out":
            leaf = "to_out.0"
        part, name = _part(f"{name}.{leaf}")
        return Key(part, name, "A" if old["which"] == "down" else "B")
    found = _ENDS.fullmatch(key)
    if found is None:
        return None
    tensor = next(which for which in ("A", "B", "m", "alpha") if found[which] is not None)
    for prefix, part in _KOHYA.items():
        if found["name"].startswith(prefix):
            return Key(part, found["name"].removeprefix(prefix), tensor, kohya=True)
    return Key(*_part(found["name"]), tensor)


def _part(name: str) -> tuple[str, str]:
    """Part and path of a name with dots."""
    name = name.removeprefix("base_model.model.")
    first, dot, rest = name.partition(".")
    return (first, rest) if dot and first in PARTS else ("", name)


def part_of(program: Program) -> str:
    """The part of a pipeline that a program is, "" if it is unknown."""
    named = str(program.base.loaded.metadata.get("part") or "")
    if named in PARTS:
        return named
    kind = type(program.base.loaded.model).__name__
    if "UNet" in kind:
        return "unet"
    if "Transformer" in kind:
        return "transformer"
    return "text_encoder" if kind.startswith(("CLIPText", "T5Encoder")) else ""


def same_part(key: Key, part: str) -> bool:
    """True if a key belongs to a part. A key without a prefix belongs to the model that the file is given for."""
    return key.part in ("", part) or (key.part == "main" and (part in MAIN or not part)) or not part
