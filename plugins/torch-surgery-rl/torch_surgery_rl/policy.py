"""What a policy is here: an nn.Module that is called with an experience's inputs and gives (logits, values).

logits: rows × steps × actions. values: rows × steps, or None for a policy without a value head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from surgery.api import SurgeryError


def trained(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters that train. Raises SurgeryError where there are none."""
    found = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not found:
        raise SurgeryError("nothing of the policy trains; apply an adapter, such as surgery.Lora, or `full`")
    return found


@contextlib.contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """The policy in eval mode: under dropout, two calls are two policies and a KL between them is not zero."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def log_probs_of(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probabilities of the actions, rows × steps."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
