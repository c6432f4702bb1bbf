"""Tensors that an objective trains of its own, beside the program: weights of losses, maps from one width to another.

An objective puts a `Learned` among its companions under the name LEARNED. The loop trains it with the program and keeps
it in checkpoints; the program is saved without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from surgery.common.errors import TrainingError

LEARNED = "learned"


class Learned(nn.Module):
    """rate: its learning rate over the program's."""

    rate: float = 1.0


def train_learned(
    companions: Mapping[str, nn.Module], accelerator: Any, optimizer: Any, lr: float
) -> dict[str, Tensor]:
    """Let the optimizer train what is learned among companions; its tensors by the names that checkpoints have.

    Raises TrainingError in several processes, of which each would learn its own.
    """
    module = companions.get(LEARNED)
    if not isinstance(module, Learned):
        return {}
    if accelerator.num_processes > 1:
        raise TrainingError(
            "this objective learns tensors of its own beside the program's, which several processes do not share; "
            "train in one process, or without what it learns (its options say what that is)"
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
