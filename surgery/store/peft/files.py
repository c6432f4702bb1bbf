"""The two files of a PEFT checkpoint, and PEFT's names of tensors, patterns and tasks in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from surgery.common.errors import LoadError
from surgery.common.files import staged_directory
from surgery.common.patterns import matcher
from surgery.common.readers import read_json, read_tensors
from surgery.store.peft.schema import check_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = "prompt_embeddings"
AGAIN = "save the checkpoint with PEFT again"


def prefix(method: str) -> str:
    """Prefix of tensor names in a checkpoint: for LoRA and IA³, PEFT wraps the model in one more module."""
    return "base_model." if method in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING") else "base_model.model."


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a checkpoint; the tensors by their names in the file.

    Raises:
        LoadError: The directory is not a PEFT checkpoint, or cannot be read.
    """
    if not (path / CONFIG).is_file():
        raise LoadError(f"{path} has no {CONFIG}, so it is not a PEFT checkpoint; give its directory")
    config = check_config(read_json(path / CONFIG, LoadError, AGAIN), path / CONFIG)
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise LoadError(
                f"{path} contains adapter_model.bin, a pickle, which can run code and is not read; save it again with "
                f"PEFT as safetensors"
            )
        raise LoadError(f"{path} has no {WEIGHTS}; {AGAIN}")
    return config, {name: t.clone() for name, t in read_tensors(path / WEIGHTS, LoadError, AGAIN).items()}


def write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overwrite: bool,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write both files into a directory; it is written under a temporary name and renamed.

    Args:
        path: Directory to write.
        config: The configuration.
        tensors: Tensors by their names in the checkpoint.
        overwrite: Replace an existing directory.
        check: Called with the temporary directory before it is renamed; an error of it leaves nothing behind.

    Raises:
        SurgeryError: The path exists, or writing fails.
    """
    with staged_directory(path, overwrite) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        contiguous = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
        check(folder)


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value for a module path in `rank_pattern` or `alpha_pattern`, by PEFT's rules.

    Args:
        patterns: Regular expression -> value. The first one that matches the end of the path wins.
        path: Path of the module.
        default: Value if no pattern matches.
    """
    ends = [path, *(path[at + 1 :] for at, character in enumerate(path) if character == ".")]
    for pattern, value in patterns.items():
        # PEFT anchors "^" at the beginning of the whole path, not at the beginning of one of its ends.
        if "^" in pattern:
            found = matcher(rf"(?:.*\.)?(?:{pattern})").fullmatch(path)
        else:
            found = any(matcher(pattern).fullmatch(end) for end in ends)
        if found:
            return value
    return default


def task_type(module: Any) -> str | None:
    """PEFT's task type of a transformers model, from its class name; None if it is unknown."""
    name = type(module).__name__
    for ending, task in (
        ("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"), ("Model", "FEATURE_EXTRACTION"),
    ):  # fmt: skip
        if name.endswith(ending):
            return task
    return None
