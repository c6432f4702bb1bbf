"""The two files of a PEFT checkpoint, and how PEFT spells names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.common.errors import LoadError
from surgery.common.files import staged_directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = "prompt_embeddings"


def prefix(method: str) -> str:
    """What PEFT puts before the names of a model's tensors: it wraps layers in one module more than prompts."""
    return "base_model." if method in ("PREFIX_TUNING", "PROMPT_TUNING") else "base_model.model."


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors, by PEFT's names less the prefix. Raises LoadError for what is no PEFT checkpoint."""
    try:
        config = json.loads((path / CONFIG).read_text())
    except OSError:
        raise LoadError(f"{path} has no {CONFIG}, so it is no PEFT checkpoint") from None
    except ValueError as error:
        raise LoadError(f"{path / CONFIG} is no JSON ({error})") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise LoadError(f"{path / CONFIG} names no peft_type; is it of PEFT?")
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise LoadError(
                f"{path} holds adapter_model.bin, a pickle, which can run code and is not read; save it again with "
                f"PEFT as safetensors"
            )
        raise LoadError(f"{path} has no {WEIGHTS}")
    try:
        tensors = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path / WEIGHTS} is no readable safetensors file ({error})") from None
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
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
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
