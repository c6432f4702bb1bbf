"""Tensors that an objective trains beside the program, such as loss weights or projections between widths.

An objective puts a `Learned` among its companions under the name LEARNED. The loop trains it with the program and
saves it in checkpoints. The saved program does not contain it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from surgery.common.errors import TrainingError

LEARNED = "learned"


class Learned(nn.Module):
    """Base of modules that an objective trains beside the program.

    Attributes:
        rate: learning rate, as a multiple of the program's.
    """

    rate: float = 1.0


def train_learned(
    companions: Mapping[str, nn.Module], accelerator: Any, optimizer: Any, lr: float
) -> dict[str, Tensor]:
    """Add the objective's learned tensors to the optimizer.

    Args:
        companions: companions of the objective.
        accelerator: accelerate's Accelerator.
        optimizer: optimizer of the program.
        lr: learning rate of the program.

    Returns:
        The learned tensors by their names in checkpoints.

    Raises:
        TrainingError: training runs in several processes, where each would learn its own values.
    """
    module = companions.get(LEARNED)
    if not isinstance(module, Learned):
        return {}
    if accelerator.num_processes > 1:
        raise TrainingError(
            "this objective learns tensors beside the program's, which several processes do not share; train in one "
            "process, or turn off the objective's options that learn tensors"
        )
    named = {f"{LEARNED}:{name}": parameter for name, parameter in module.named_parameters()}
    optimizer.add_param_group(
        {
            "params": list(named.values()),
            "names": list(named),
            "lr": lr * module.rate,
            "weight_decay": 0.0,
        }
    )
    return {**named, **{f"{LEARNED}:{name}": buffer for name, buffer in module.named_buffers()}}
