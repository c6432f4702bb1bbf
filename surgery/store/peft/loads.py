"""The check of a checkpoint that was written: PEFT loads it, and its model gives the program's outputs."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch

from surgery.capture.trace import to_plain
from surgery.common.errors import ExportError
from surgery.common.readers import first_line
from surgery.engine.contract.observe import observe
from surgery.engine.program import Program

# PEFT's classes for these change the inputs and outputs, so only their loading is compared.
_TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING")


def can_check(program: Program) -> bool:
    """True if PEFT is installed and the weights are in memory."""
    return importlib.util.find_spec("peft") is not None and program.base.in_memory


def check_loads(program: Program, folder: Path, kind: str) -> None:
    """Load a checkpoint with PEFT on a copy of the base and compare the outputs on the example inputs.

    Args:
        program: The program that was written.
        folder: Directory of the checkpoint.
        kind: PEFT's type.

    Raises:
        ExportError: PEFT does not load it, lacks tensors in it, or gives other outputs.
    """
    from peft import PeftModel

    loaded = program.base.loaded
    remedy = "this is a fault of surgery; save the program, and please report it"
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model: Any = PeftModel.from_pretrained(copy.deepcopy(loaded.module), str(folder)).eval()
            if kind in _TOKENS:
                got = expected = None
            else:
                with loaded.patches():
                    got = to_plain(model(*loaded.args, **loaded.kwargs))
                expected = program.run()
        except Exception as error:
            raise ExportError(
                f"PEFT does not load the checkpoint ({type(error).__name__}: {first_line(error)}); {remedy}"
            ) from error
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if missing:
        raise ExportError(f"PEFT does not find everything in the checkpoint ({missing[0][:200]}); {remedy}")
    seen = observe(expected, got)
    if not seen.difference <= program.merge_tolerance:
        raise ExportError(
            f"PEFT's model of the checkpoint gives other outputs than the program ({seen} of their scale); {remedy}"
        )
