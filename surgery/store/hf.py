"""Writes a program as a transformers directory that `AutoModel.from_pretrained` loads."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture.devices import HOME
from surgery.capture.hf_config import configs, silenced
from surgery.capture.hf_files import COMPANIONS
from surgery.common.errors import ExportError
from surgery.common.files import staged_directory
from surgery.engine.base import Base
from surgery.engine.fold import foldable
from surgery.engine.labels import Labels, write_labels
from surgery.engine.moving import moved
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.store.provenance import write_provenance

# The sizes that huggingface_hub accepts.
_SIZE = re.compile(r"[1-9]\d*(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


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
    if max_shard_size is not None and not _SIZE.fullmatch(max_shard_size):
        raise ExportError(f"--max-shard-size {max_shard_size}: write a size, such as 5GB or 200MB")
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


def write_base(base: Base, folder: Path) -> None:
    """Write the base of a program without its passes, for --standalone."""
    folder.mkdir()
    base = base if base.device == HOME else moved(base, HOME)
    _write(base, base.tensors, folder)


def _write(
    base: Base,
    state: Mapping[str, Tensor],
    folder: Path,
    max_shard_size: str | None = None,
    labels: Labels | None = None,
) -> None:
    """Write a directory with `state` as the weights of a new module of the base's class."""
    module: Any = base.loaded.model
    if not hasattr(module, "save_pretrained") or not hasattr(module, "config"):
        raise ExportError(
            f"--format hf needs a transformers model, but the base is {base.ref or type(module).__name__}; "
            f"use the default format, or export to ONNX"
        )
    config = copy.deepcopy(base.loaded.config or module.config)
    # The weights were dequantized when the model was loaded.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tied = {name: group for name, group in base.names.items() if len(group) > 1}
    # A pass can untie weights; transformers would tie them again when it loads the directory.
    if any(state[name] is not state[group[0]] for name, group in tied.items()):
        config.tie_word_embeddings = False
    _resize_vocabulary(config, module, state)
    write_labels(config, labels or {})
    with torch.device("meta"):
        fresh = type(module)(config)
    # A merge that became the base has untied weights too, and the base itself no longer ties them.
    if getattr(config, "tie_word_embeddings", False) and not _tied_alike(fresh, state):
        config.tie_word_embeddings = False
        with torch.device("meta"):
            fresh = type(module)(config)
    names = set(module.state_dict())
    values = {n: t.detach() for n, t in state.items() if n in names}
    ties = bool(getattr(config, "tie_word_embeddings", False))
    if not ties:
        # transformers ties nothing then, and drops all but one of the tensors that share their memory.
        values = _apart(values)
    fresh.load_state_dict(values, assign=True, strict=True)
    if ties:
        fresh.tie_weights()
    _unfake(fresh)
    if getattr(module, "generation_config", None) is not None:
        fresh.generation_config = copy.deepcopy(module.generation_config)
    with _no_progress_bars():
        try:
            fresh.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
        except ValueError as error:
            if max_shard_size is None or "size" not in str(error):
                raise
            raise ExportError(
                f"--max-shard-size {max_shard_size}: write a size, such as 5GB or 200MB"
            ) from error
        _check(type(module), folder, values)
    write_companions(base, folder)


def _apart(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a copy for each name after the first of those that share their memory."""
    seen: set[int] = set()
    found = {}
    for name, value in values.items():
        found[name] = value.clone() if value.numel() and value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return found


def _check(cls: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
    """Load a directory with transformers and compare every tensor with the program's.

    Args:
        cls: Class of the model.
        folder: The directory.
        values: The program's tensors by name.

    Raises:
        ExportError: A tensor is missing, or has other values.
    """
    import transformers

    with silenced(transformers):
        again = cls.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    found = again.state_dict()
    for name, value in values.items():
        own = found.get(name)
        # A directory has one dtype for all weights where the configuration names one.
        if own is None or own.shape != value.shape or not _same(own, value):
            raise ExportError(
                f"transformers reads {name} from the directory with other values than the program has, so it was not "
                f"written; save the program in its own format, and please report this"
            )


def _same(own: Tensor, value: Tensor) -> bool:
    """True if values are equal, NaN included, in the dtype that transformers has chosen."""
    value = value.to(own.device, own.dtype)
    if torch.equal(own, value):
        return True
    return own.is_floating_point() and torch.equal(own.nan_to_num(nan=0.5), value.nan_to_num(nan=0.5))


def _tied_alike(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """True if the weights that a module ties have one value in the program."""
    groups: dict[int, list[Tensor]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in state:
            groups.setdefault(id(parameter), []).append(state[name])
    return all(t is group[0] or torch.equal(t, group[0]) for group in groups.values() for t in group[1:])


def _resize_vocabulary(config: Any, module: Any, state: Mapping[str, Tensor]) -> None:
    """Set `vocab_size` in the configuration if a token embedding has more rows than before."""
    for name, tensor in module.named_parameters():
        if name in state and tensor.dim() == 2 and state[name].shape[1:] == tensor.shape[1:]:
            for part in configs(config):
                if getattr(part, "vocab_size", None) == tensor.shape[0] < state[name].shape[0]:
                    part.vocab_size = state[name].shape[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch the progress bars of transformers off inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _unfake(module: nn.Module) -> None:
    """Raise ExportError if a parameter got no value from the program and is still on the meta device."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ExportError(
                f"the program has no value for {name}; use the model class that it was captured from"
            )


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
