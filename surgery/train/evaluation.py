"""Held-out figures of an objective, outside of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery.capture.devices import device_of, on_device
from surgery.common.progress import track
from surgery.train.batch_order import draw_for
from surgery.train.data_context import Setting
from surgery.train.examples import Examples
from surgery.train.objective import Objective

HELD_OUT = "held out"  # purpose of the random draws of held-out batches


@torch.no_grad()
def observe(
    objective: Objective,
    module: nn.Module,
    data: Examples,
    setting: Setting,
    *,
    batch: int = 16,
    seed: int = 0,
    companions: Mapping[str, nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Run a module on held-out examples. `objective.metrics` of the result are the figures that a training reports.

    Args:
        objective: the objective.
        module: module to judge, in eval mode.
        data: examples of the objective.
        setting: data context, prepared by the objective.
        batch: examples per batch.
        seed: seed of what the objective draws.
        companions: other modules that the objective needs.

    Returns:
        The tensors that the objective observes, over all examples.
    """
    seen, device = [], device_of(module)
    for companion in (companions or {}).values():
        companion.to(device)
    for number, chosen in enumerate(track(objective.epoch(data, batch, None), "evaluating")):
        made = on_device(objective.collate(data[chosen], setting, draw_for(seed, HELD_OUT, number)), device)
        observed = objective.observe(module, objective.complete(made, companions or {}))
        seen.append({name: tensor.cpu() for name, tensor in observed.items()})
    return joined(seen)


def joined(seen: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate what was observed on each batch."""
    names = dict.fromkeys(name for each in seen for name in each)
    return {name: torch.cat([each[name] for each in seen if name in each]) for name in names}
