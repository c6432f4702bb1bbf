"""Writes a program as a transformers directory that `AutoModel.from_pretrained` loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.capture.devices import HOME
from surgery.capture.diffusers import is_diffusers
from surgery.capture.hf_files import COMPANIONS
from surgery.capture.sentence.modules import SentenceEncoder
from surgery.common.errors import ExportError
from surgery.common.files import staged_directory
from surgery.engine.base import Base
from surgery.engine.fold import foldable
from surgery.engine.labels import Labels
from surgery.engine.moving import moved
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.store.provenance import write_provenance
from surgery.store.sentence import transformer_path, write_sentence
from surgery.store.transformers_model import check_shard_size, write_model


def write_hf(
    program: Program, path: Any, *, overwrite: bool = False, max_shard_size: str | None = None
) -> None:
    """Write the weights, configuration, generation configuration and tokenizer of a merged program.

    Args:
        program: A program of a transformers model, without adapters.
        path: Directory to write.
        overwrite: Replace an existing directory.
        max_shard_size: Largest size of a safetensors file, such as "5GB"; larger weights are split into several files
            with an index. None for the default of transformers.

    Raises:
        ExportError: The program contains an adapter, the base is not a transformers model, or the size is invalid.
        SurgeryError: The path exists, or writing fails.
    """
    check_shard_size(max_shard_size)
    left = live_entries(program.journal)
    if left:
        _, kept = foldable(program.base, program.journal, program.sites, program.tensors)
        why = f": {kept[left[0].id]}" if left[0].id in kept else "; merge first, or export to ONNX"
        raise ExportError(
            f"{left[0].id!r} is not folded into the weights, and a transformers directory cannot contain it{why}"
        )
    program = program.to(HOME)
    with staged_directory(Path(path), overwrite) as folder:
        _write(program.base, program.state(), folder, max_shard_size, program.labels)
        write_provenance(program, folder, "hf")


def write_base(base: Base, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the base of a program without its passes, for --standalone.

    Args:
        base: The base.
        folder: Directory to write.
        state: Other values of its weights; None for its own.
    """
    folder.mkdir(exist_ok=state is not None)
    base = base if base.device == HOME else moved(base, HOME)
    _write(base, base.tensors if state is None else state, folder)


def _write(
    base: Base,
    state: Mapping[str, Tensor],
    folder: Path,
    max_shard_size: str | None = None,
    labels: Labels | None = None,
) -> None:
    """Write a directory with `state` as the weights of a new module of the base's class."""
    module: Any = base.loaded.model
    if is_diffusers(module):
        raise ExportError(
            "--format hf needs a transformers model, but the base is one of diffusers; use --format diffusers"
        )
    if isinstance(module, SentenceEncoder):
        write_sentence(base, module, state, folder, max_shard_size)
        write_companions(base, folder / transformer_path(base))
        return
    if not hasattr(module, "save_pretrained") or not hasattr(module, "config"):
        raise ExportError(
            f"--format hf needs a transformers model, but the base is {base.ref or type(module).__name__}; "
            f"use the default format, or export to ONNX"
        )
    tied = {name: group for name, group in base.names.items() if len(group) > 1}
    config = base.loaded.config or module.config
    write_model(module, config, state, tied, folder, max_shard_size=max_shard_size, labels=labels)
    write_companions(base, folder)


def write_companions(base: Base, folder: Path) -> None:
    """Copy the files of tokenizer and processor from the directory that the base was loaded from."""
    # A live model has no list of files, but its configuration names the directory.
    named = getattr(base.loaded.config, "_name_or_path", "")
    source = base.loaded.files[0].parent if base.loaded.files else Path(named)
    if (not named and not base.loaded.files) or not source.is_dir():
        return
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)
    gguf = base.options.model_kwargs.get("gguf_file")
    if gguf and not list(folder.glob("tokenizer*")):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source, gguf_file=gguf, trust_remote_code=False).save_pretrained(folder)
