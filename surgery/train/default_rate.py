"""The learning rate that a training uses if none is given."""

from __future__ import annotations

from surgery.capture.hf_config import configs
from surgery.engine.program import Program
from surgery.train.objective import Objective

# Weights of a checkpoint (Devlin et al. 2019, arXiv:1810.04805, appendix A.3: 2e-5 to 5e-5).
_FINE_TUNED = 5e-5
# Everything that starts from random values: heads, and models without a checkpoint.
_FROM_SCRATCH = 1e-3
# LoRA trains at ten times the rate of its base, and narrow models train at higher rates: 5e-4 · (2000 / width)^0.775
# (Schulman et al. 2025, "LoRA Without Regret", fitted on Llama models).
_ADAPTER, _WIDTH, _POWER = 5e-4, 2000, 0.775
_LEAST, _MOST = 1e-4, 2e-3


def default_rate(program: Program, objective: Objective) -> float:
    """Return the peak learning rate of AdamW for what trains in a program.

    It is 5e-5 if weights of a checkpoint train, else 5e-4 · (2000 / width)^0.775, within 1e-4 and 2e-3, if adapters
    train, else 1e-3. Objectives that need smaller steps multiply it (`Objective.pace`).
    """
    base = program.base
    sourced = (
        [name for name in base.tensors if name not in base.loaded.unsourced] if base.loaded.files else []
    )
    sizes = program.parameter_sizes()
    if any(name in sizes and program.trains(name) for name in sourced):
        rate = _FINE_TUNED
    elif any(program.trains(name) and name not in program.names for name in program.tensors):
        rate = min(_MOST, max(_LEAST, _ADAPTER * (_WIDTH / _width(program)) ** _POWER))
    else:
        rate = _FROM_SCRATCH
    return float(f"{rate * objective.pace:.2g}")


def _width(program: Program) -> int:
    """Width of the hidden states of a transformers model, or 1000 for another model."""
    config = program.base.loaded.config
    for part in configs(config) if config is not None else ():
        for name in ("hidden_size", "d_model"):
            found = getattr(part, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return 1000
