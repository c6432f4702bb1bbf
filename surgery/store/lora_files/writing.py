"""Writes the LoRAs of programs, each of them one model of a pipeline, as one file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery.capture.devices import HOME
from surgery.common.errors import ExportError, SurgeryError
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.store.lora_files import flux
from surgery.store.lora_files.keys import MAIN, part_of
from surgery.store.lora_files.names import clip_path, kohya_names
from surgery.store.lora_files.reading import WEIGHTS
from surgery.store.peft.files import by_pattern
from surgery.store.peft.write_lora import write_lora

FORMATS = ("peft", "diffusers", "kohya")


@dataclass(frozen=True)
class _Factors:
    """A LoRA at one module; its update is `scale` B A.

    Attributes:
        a, b: the factors.
        scale: factor of their product.
        m: magnitudes of DoRA, or None.
    """

    a: Tensor
    b: Tensor
    scale: float
    m: Tensor | None = None


def export_lora(
    programs: Program | Sequence[Program], path: Any, *, format: str = "peft", overwrite: bool = False
) -> list[str]:
    """Write a file that `load_lora_weights` of diffusers reads.

    Args:
        programs: Programs of the models of one pipeline, such as its UNet and its text encoder, with LoRAs only.
        path: File to write, or a directory, which gets a pytorch_lora_weights.safetensors.
        format: "peft" (`unet.….lora_A.weight`, as diffusers saves them today), "diffusers"
            (`unet.….lora.down.weight`, as its training scripts have written them), or "kohya"
            (`lora_unet_….lora_down.weight` with `alpha`, for the tools around kohya's scripts). The first two have the
            scale multiplied into B. kohya's has the names of Stable Diffusion 1 and XL, and of Flux, some of whose
            projections are fused.
        overwrite: Replace an existing file.

    Returns:
        The keys that were written.

    Raises:
        ExportError: A program has other passes than LoRA, is no model of a pipeline, or one that the format has no
            names for.
        SurgeryError: The file exists, or cannot be written.
    """
    if format not in FORMATS:
        raise ExportError(f"export-lora: there is no format {format!r}; give {', '.join(FORMATS)}")
    listed = [programs] if isinstance(programs, Program) else list(programs)
    file = file_of(path)
    if file.exists() and not overwrite:
        raise SurgeryError(f"{file} exists; remove it, choose another path, or add --overwrite")
    tensors: dict[str, Tensor] = {}
    for program in listed:
        part = part_of(program)
        if not part:
            raise ExportError(
                f"{type(program.base.loaded.model).__name__} is no model of a pipeline of diffusers; use export-peft"
            )
        own = _contents(program.to(HOME), part, format)
        if tensors.keys() & own.keys():
            raise ExportError(f"two programs are the {part} of the pipeline; give one of each part")
        tensors.update(own)
    _write(file, tensors)
    return list(tensors)


def file_of(path: Any) -> Path:
    """The file that is written for a path: itself, or diffusers' name of it in a directory."""
    file = Path(path)
    return file if file.suffix == ".safetensors" else file / WEIGHTS


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file under a temporary name and rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        aside = Path(folder) / file.name
        save_file(contiguous, aside, metadata={"format": "pt"})
        aside.replace(file)


def _contents(program: Program, part: str, format: str) -> dict[str, Tensor]:
    """The tensors of one program by their keys."""
    factors = _factors(program)
    if format == "kohya":
        return _kohya(program, part, factors)
    model, found = program.base.loaded.model, {}
    for path, own in factors.items():
        name = f"{part}.{clip_path(model, path)}"
        down, up = ("lora_A", "lora_B") if format == "peft" else ("lora.down", "lora.up")
        if format == "diffusers" and part.startswith("text_encoder"):
            down, up = "lora_linear_layer.down", "lora_linear_layer.up"
        found[f"{name}.{down}.weight"] = own.a
        # Without an alpha, readers take the rank for it.
        found[f"{name}.{up}.weight"] = own.b * own.scale
        if own.m is not None:
            found[f"{name}.lora_magnitude_vector"] = own.m
    return found


def _factors(program: Program) -> dict[str, _Factors]:
    """The LoRAs of a program by path of the module. Raises ExportError for anything else in it."""
    live = live_entries(program.journal)
    other = next((entry for entry in live if entry.pass_name != "lora"), None)
    if other is not None or not live:
        what = (
            f"{other.id} is no LoRA; leave it out (--without)"
            if other
            else "the program has no LoRA; apply one"
        )
        raise ExportError(f"export-lora: {what}")
    if program.changed:
        raise ExportError(
            f"export-lora: {min(program.changed)} was trained itself, which no LoRA file has; freeze it, or write the "
            "merged model"
        )
    config, tensors, _ = write_lora(program, live)
    if config.get("target_parameters") or config["lora_bias"]:
        what = "a bias of its own" if config["lora_bias"] else "a parameter that is no module's weight"
        raise ExportError(
            f"export-lora: a LoRA has {what}, for which these files have no key; use export-peft"
        )
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight")
        rank = a.shape[0]
        alpha = by_pattern(config["alpha_pattern"], path, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        found[path] = _Factors(
            a, tensors[f"{path}.lora_B.weight"], scale, tensors.get(f"{path}.lora_magnitude_vector")
        )
    left = next((n for n in tensors if ".lora_embedding_" in n), None)
    if left is not None:
        raise ExportError(f"export-lora: {left} is a LoRA of an embedding, for which these files have no key")
    return found


def _kohya(program: Program, part: str, factors: Mapping[str, _Factors]) -> dict[str, Tensor]:
    """The tensors of one program by kohya's keys."""
    names = kohya_names(program, factors)
    if names is None:
        raise ExportError(
            f"export-lora: kohya's format has no names known here for {type(program.base.loaded.model).__name__}; use "
            "--format peft"
        )
    start = _start(program, part)
    outs = {site.path: site.out_features for site in program.base.sites}
    found = {}
    for name, paths in names.items():
        own = factors[paths[0]] if len(paths) == 1 else _fused(paths, factors, outs)
        b = own.b
        if type(program.base.loaded.model).__name__.startswith("Flux") and paths[0] in flux.SWAPPED:
            b = b.roll(b.shape[0] // 2, 0)
        found[f"{start}{name}.lora_down.weight"] = own.a
        found[f"{start}{name}.lora_up.weight"] = b
        found[f"{start}{name}.alpha"] = torch.tensor(own.scale * own.a.shape[0])
        if own.m is not None:
            found[f"{start}{name}.dora_scale"] = own.m.reshape(-1, *[1] * (own.a.dim() - 1))
    return found


def _start(program: Program, part: str) -> str:
    """kohya's prefix of a part. The text encoder of a pipeline with two of them is the first."""
    if part in MAIN:
        return "lora_unet_"
    if part == "text_encoder":
        files = program.base.loaded.files
        several = bool(files) and (files[0].parent.parent / "text_encoder_2").is_dir()
        return "lora_te1_" if several else "lora_te_"
    return f"lora_te{part.rpartition('_')[2]}_"


def _fused(paths: Sequence[str], factors: Mapping[str, _Factors], outs: Mapping[str, int]) -> _Factors:
    """The factors of a fused projection: A stacked, and B with a block for each part."""
    own = {path: factors[path] for path in paths if path in factors}
    if any(each.m is not None for each in own.values()):
        raise ExportError(
            f"export-lora: kohya's format fuses {', '.join(paths)}, and a DoRA of one is none of all; use --format peft"
        )
    first = next(iter(own.values()))
    # Factors that were taken from one fused projection read the same A.
    shared = all(each.a.shape == first.a.shape and torch.equal(each.a, first.a) for each in own.values())
    rank = first.a.shape[0] if shared else sum(each.a.shape[0] for each in own.values())
    blocks, column = [], 0
    for path in paths:
        block = first.b.new_zeros(outs[path], rank)
        if path in own:
            start = 0 if shared else column
            width = own[path].a.shape[0]
            # One scale for all: that of the first.
            block[:, start : start + width] = own[path].b * (own[path].scale / first.scale)
            column += width
        blocks.append(block)
    a = first.a if shared else torch.cat([each.a for each in own.values()])
    return _Factors(a, torch.cat(blocks), first.scale)
