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
from surgery.store.peft.files import read
from surgery.store.peft.library import model_of, within_limits

# PEFT's classes for these change the inputs and outputs, so only their loading is compared.
_TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING")


def can_check(program: Program) -> bool:
    """True if PEFT is installed, and the base is a model that it can adapt: in memory, without packed weights.

    The layers of packed weights are those of another library. Their adapters are written for the unpacked model.
    """
    packed = any(site.packed for site in program.base.sites)
    return importlib.util.find_spec("peft") is not None and program.base.in_memory and not packed


def check_loads(program: Program, folder: Path, given_back: bool) -> None:
    """Load a checkpoint with PEFT on a copy of the base and compare the outputs on the example inputs.

    Args:
        program: The program that was written.
        folder: Directory of the checkpoint.
        given_back: The configuration came from elsewhere with a saved directory, so PEFT does not read it itself.

    Raises:
        ExportError: PEFT does not load it, lacks tensors in it, or gives other outputs.
    """
    from peft import PeftModel

    loaded, (config, tensors) = program.base.loaded, read(folder)
    remedy = "this is a fault of surgery; save the program, and please report it"
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model: Any
            if given_back:
                with within_limits(program.base, tensors, str(folder)):
                    model = model_of(config, tensors, program.base, str(folder))
            else:
                model = PeftModel.from_pretrained(copy.deepcopy(loaded.module), str(folder)).eval()
            if config["peft_type"] in _TOKENS:
                got = expected = None
            else:
                with loaded.patches():
                    got = to_plain(model(*loaded.args, **loaded.kwargs))
                expected = program.run()
        except Exception as error:
            raise ExportError(f"PEFT does not load the checkpoint ({first_line(error)}); {remedy}") from error
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if missing:
        raise ExportError(f"PEFT does not find everything in the checkpoint ({missing[0][:200]}); {remedy}")
    seen = observe(expected, got)
    if not seen.difference <= program.merge_tolerance:
        raise ExportError(
            f"PEFT's model of the checkpoint gives other outputs than the program ({seen} of their scale); {remedy}"
        )
