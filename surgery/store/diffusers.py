"""Writes a program as a part of a pipeline that diffusers reads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture.devices import HOME
from surgery.capture.diffusers import HALVES, INDEX, WEIGHTS, is_diffusers, weight_files
from surgery.capture.hf_config import silenced
from surgery.common.errors import ExportError
from surgery.common.files import staged_directory
from surgery.engine.base import Base
from surgery.engine.moving import moved
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.store.hf import write_base

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx")


def write_diffusers(program: Program, path: Any, *, overwrite: bool = False) -> bool:
    """Write a merged program: the whole pipeline with the new weights of this part, or the part alone.

    The other parts are copied from the directory that the part was loaded from. If it came from the hub, or from a
    module, only the part is written: give it to the pipeline with `from_pretrained(…, unet=…)`.

    Args:
        program: A program of a part of a pipeline, without adapters.
        path: Directory to write.
        overwrite: Replace an existing directory.

    Returns:
        True if the directory is a whole pipeline.

    Raises:
        ExportError: The program contains an adapter, or the base is no part of a pipeline.
        SurgeryError: The path exists, or writing fails.
    """
    base = program.base
    part = str(base.loaded.metadata.get("part") or "")
    if not is_diffusers(base.loaded.model) and base.loaded.metadata.get("loader") != "diffusers":
        raise ExportError(
            f"--format diffusers needs a part of a pipeline, but the base is {base.ref or 'a module'}; use --format hf"
        )
    left = live_entries(program.journal)
    if left:
        raise ExportError(
            f"{left[0].id!r} is not folded into the weights, and a pipeline cannot contain it; merge first, or write a "
            "LoRA file with export-lora"
        )
    program = program.to(HOME)
    part = HALVES.get(part, part)
    pipeline = _pipeline(base, part)
    with staged_directory(Path(path), overwrite) as folder:
        if pipeline is None:
            write_part(program.base, folder, program.state())
        else:
            weights = f"{part}/*"
            shutil.copytree(pipeline, folder, dirs_exist_ok=True, ignore=_other_formats)
            for old in folder.glob(weights):
                if old.suffix == ".safetensors" or ".safetensors.index" in old.name:
                    old.unlink()
            write_part(program.base, folder / part, program.state())
    return pipeline is not None


def _other_formats(folder: str, names: list[str]) -> set[str]:
    """Names of weights that are not read: they would be those of before."""
    return {name for name in names if name.endswith(_PICKLES)}


def _pipeline(base: Base, part: str) -> Path | None:
    """Directory of the pipeline that a part was loaded from, if it is whole."""
    files = base.loaded.files
    if not files or base.loaded.repo:
        return None
    folder = files[0].parent
    return folder.parent if folder.name == part and (folder.parent / INDEX).is_file() else None


def write_part(base: Base, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the directory of one part.

    Args:
        base: The base.
        folder: Directory to write.
        state: Values of its weights; None for its own.

    Raises:
        ExportError: diffusers reads other values than those of the program.
    """
    model: Any = base.loaded.model
    if not is_diffusers(model):
        write_base(base, folder, state)
        return
    base = base if base.device == HOME else moved(base, HOME)
    folder.mkdir(exist_ok=True)
    import transformers

    names = set(model.state_dict())
    values = {name: tensor.detach() for name, tensor in (state or base.tensors).items() if name in names}
    with silenced(transformers):
        with torch.device("meta"):
            fresh: nn.Module = type(model).from_config(model.config)
        fresh.load_state_dict(values, assign=True, strict=True)
        fresh.save_pretrained(folder)  # type: ignore[operator]
        files = [file for file in weight_files(folder) if file.suffix == ".safetensors"]
        dtype = next((t.dtype for t in values.values() if t.is_floating_point()), torch.float32)
        again = type(model).from_pretrained(str(folder), torch_dtype=dtype, use_safetensors=True).state_dict()
    for name, value in values.items():
        if name not in again or not torch.equal(again[name].nan_to_num(0.5), value.nan_to_num(0.5)):
            raise ExportError(
                f"diffusers reads {name} from {WEIGHTS}.safetensors ({len(files)} files) with other values than the "
                "program has, so it was not written; save the program in its own format, and please report this"
            )
