"""The two files of a PEFT checkpoint, and how PEFT spells names in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    """What PEFT puts before the names of a model's tensors: it wraps layers in one module more than prompts."""
    return "base_model." if method in ("PREFIX_TUNING", "PROMPT_TUNING") else "base_model.model."


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors, by PEFT's names less the prefix. Raises LoadError for what is no PEFT checkpoint."""
    if not (path / CONFIG).is_file():
        raise LoadError(f"{path} has no {CONFIG}, so it is no PEFT checkpoint")
    config = check_config(read_json(path / CONFIG, LoadError, AGAIN), path / CONFIG)
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise LoadError(
                f"{path} holds adapter_model.bin, a pickle, which can run code and is not read; save it again with "
                f"PEFT as safetensors"
            )
        raise LoadError(f"{path} has no {WEIGHTS}")
    tensors = read_tensors(path / WEIGHTS, LoadError, AGAIN)
    own = prefix(config["peft_type"])
    return config, {name.removeprefix(own): tensor.clone() for name, tensor in tensors.items()}


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool) -> None:
    """Both files, in a directory that is written aside and renamed. Raises SurgeryError."""
    with staged_directory(path, overwrite) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        contiguous = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module path, as PEFT reads rank_pattern and its like."""
    ends = [path, *(path[at + 1 :] for at, character in enumerate(path) if character == ".")]
    for pattern, value in patterns.items():
        if "^" in pattern:  # an anchor is at the beginning of the path, not of one of its ends
            found = matcher(rf"(?:.*\.)?(?:{pattern})").fullmatch(path)
        else:
            found = any(matcher(pattern).fullmatch(end) for end in ends)
        if found:
            return value
    return default


def task_type(module: Any) -> str | None:
    """PEFT's name of a transformers model's task, or None."""
    name = type(module).__name__
    for ending, task in (
        ("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"), ("Model", "FEATURE_EXTRACTION"),
    ):  # fmt: skip
        if name.endswith(ending):
            return task
    return None
