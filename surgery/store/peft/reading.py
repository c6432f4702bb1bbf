"""Reads a PEFT checkpoint: applies the corresponding passes to a program of its base and copies the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.common.errors import LoadError, SurgeryError
from surgery.common.readers import first_line
from surgery.engine.program import Program
from surgery.store.peft.checkpoint_data import Checkpoint, Unread
from surgery.store.peft.factored import nearest_lora
from surgery.store.peft.files import AGAIN, WEIGHTS, prefix, read
from surgery.store.peft.read_ia3 import read_ia3
from surgery.store.peft.read_lora import read_lora
from surgery.store.peft.read_merged import read_merged
from surgery.store.peft.read_tokens import read_prefix, read_prompt
from surgery.store.peft.schema import check_names

_WRAPPED = re.compile(r"\.(?:modules_to_save|original_module)\.")


def import_peft(path: Any, base: Program, *, label: str = "", as_lora: int | None = None) -> Program:
    """Apply a PEFT checkpoint to a program.

    LoRA (with rsLoRA, DoRA, PiSSA, patterns, lora_bias, target_parameters, trainable tokens, modules_to_save), IA³,
    prefix tuning and prompt tuning are applied by passes of their own. Of every other type that PEFT can merge, the
    merged weights are recorded as a `delta`, which needs PEFT to be installed.

    Args:
        path: Directory of the checkpoint.
        base: Program of the model that the checkpoint was made for, of the same class.
        label: Label of the passes. If ranks or alphas differ, there is a pass for each, with the labels label_1,
            label_2, …
        as_lora: Turn a delta into the nearest LoRA of this rank; the journal states the error. None keeps it whole.

    Returns:
        The program with the passes applied.

    Raises:
        LoadError: The checkpoint cannot be read, was made for another base, lacks tensors, or has a method or an
            option without a counterpart here.
    """
    config, raw = read(Path(path))
    check_names(raw, Path(path) / WEIGHTS, base)
    kind = str(config["peft_type"])
    own = prefix(kind)
    # With bias="all" PEFT also stores the biases within its wrappers of modules_to_save, and does not read them.
    tensors = {name.removeprefix(own): tensor for name, tensor in raw.items() if not _WRAPPED.search(name)}
    readers = {
        "LORA": read_lora,
        "IA3": read_ia3,
        "PREFIX_TUNING": read_prefix,
        "PROMPT_TUNING": read_prompt,
        "P_TUNING": read_prompt,
    }
    given = Checkpoint(str(path), config, tensors, label, raw)
    try:
        program = _read(given, base, readers.get(kind, read_merged))
        return program if as_lora is None else nearest_lora(program, as_lora)
    except SurgeryError:
        raise
    except Exception as error:
        # The file is not trusted, and can have contents that raise any exception.
        raise LoadError(
            f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); {AGAIN}"
        ) from error


def _read(given: Checkpoint, base: Program, reader: Callable[[Checkpoint, Program], Program]) -> Program:
    """Apply a checkpoint by its own pass, or by the weights that PEFT merges if it uses what the pass lacks."""
    try:
        return reader(given, base)
    except Unread as unread:
        try:
            return read_merged(given, base)
        except LoadError as error:
            said = str(error).removeprefix(f"{given.path}: ")
            raise LoadError(f"{given.path}: {unread}. {said[:1].upper()}{said[1:]}") from None
