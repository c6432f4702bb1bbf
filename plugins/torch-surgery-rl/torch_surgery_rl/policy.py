"""Policies: modules that map the inputs of an experience to (logits, values).

logits are rows × steps × actions. values are rows × steps, or None without a value head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from surgery.api import SurgeryError


def trained(policy: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters.

    Raises:
        SurgeryError: there are none.
    """
    found = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not found:
        raise SurgeryError(
            "the policy has no trainable parameter; apply an adapter, such as surgery.Lora, or `full`"
        )
    return found


@contextlib.contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Put the policy in eval mode for a while.

    With dropout, two calls are two policies, and the KL between them is not zero.
    """
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def log_probs_of(logits: Tensor, actions: Tensor) -> Tensor:
    """Return the log-probabilities of the actions, rows × steps."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
