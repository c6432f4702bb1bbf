"""Writes a transformers model with given weights as `from_pretrained` reads it, and compares it with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture.hf_config import configs, silenced
from surgery.common.errors import ExportError
from surgery.engine.labels import Labels, write_labels

# The sizes that huggingface_hub accepts.
_SIZE = re.compile(r"[1-9]\d*(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


def check_shard_size(size: str | None) -> None:
    """Raise ExportError if a text is no size of a file that huggingface_hub accepts."""
    if size is not None and not _SIZE.fullmatch(size):
        raise ExportError(f"--max-shard-size {size}: write a size, such as 5GB or 200MB")


def write_model(
    module: Any,
    config: Any,
    state: Mapping[str, Tensor],
    tied: Mapping[str, tuple[str, ...]],
    folder: Path,
    *,
    max_shard_size: str | None = None,
    labels: Labels | None = None,
) -> None:
    """Write a new module of the same class with `state` as its weights.

    Args:
        module: The transformers model; it is not changed.
        config: Its configuration before it was prepared for capture.
        state: Weights by the module's names.
        tied: Name -> all names of that tensor, for tensors with several names.
        folder: Directory to write.
        max_shard_size: Largest size of a file, such as "5GB"; None for the default of transformers.
        labels: Class names by output.

    Raises:
        ExportError: A weight has no value, or transformers reads another value from the directory.
    """
    config = copy.deepcopy(config)
    # The weights were dequantized when the model was loaded.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
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
