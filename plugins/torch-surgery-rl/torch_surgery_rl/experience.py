"""What a policy did, and how good it was: the rows that PPO and TRPO learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.api import SurgeryError
from torch_surgery_rl.estimates import gae, same_shape, whiten
from torch_surgery_rl.kl import categorical_kl
from torch_surgery_rl.policy import evaluating, log_probs_of


@dataclass(frozen=True)
class Experience:
    """N episodes of up to T actions.

    inputs: what the policy is called with, each with N rows. actions, mask: N × T; the mask says which are actions.
    log_probs, values: of the policy that acted. advantages, returns: see `of`. All but inputs are N × T.
    """

    inputs: Mapping[str, Tensor]
    actions: Tensor
    mask: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, Tensor],
        actions: Tensor,
        mask: Tensor,
        rewards: Tensor,
        log_probs: Tensor,
        values: Tensor | None,
        *,
        gamma: float = 1.0,
        lam: float = 0.95,
        last_values: Tensor | None = None,
        whitened: bool = True,
    ) -> Experience:
        """With advantages by GAE (whitened over the batch, unless told otherwise) and returns from the rewards.

        log_probs, values: what `evaluate` gives. last_values: see `gae`.
        Raises SurgeryError for rows without an action and for what is not finite.
        """
        if values is None:
            raise SurgeryError(
                "the policy gives no values; graft a value head with surgery.Head(mode='add', labels=1, "
                "head_name='value', pool='none')"
            )
        same_shape(actions=actions, mask=mask, rewards=rewards, log_probs=log_probs, values=values)
        if mask.dtype != torch.bool:
            raise SurgeryError(f"the mask is of {mask.dtype}, and has to be of torch.bool")
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        if empty or not len(mask):
            raise SurgeryError(f"row {empty[0]} has no action (an empty response)" if empty else "no rows")
        for name, tensor in (("reward", rewards), ("log-probability", log_probs), ("value", values)):
            wrong = (mask & ~tensor.isfinite()).nonzero()
            if len(wrong):
                row, step = wrong[0].tolist()
                raise SurgeryError(f"the {name} of row {row}, step {step} is {tensor[row, step].item()}")
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, last_values=last_values)
        if whitened:
            advantages = whiten(advantages, mask)
        return cls(inputs, actions, mask, log_probs, values, advantages, returns)

    def __len__(self) -> int:
        return len(self.actions)

    def rows(self, index: Tensor | slice) -> Experience:
        """Some of the rows."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        inputs = {name: tensor[index] for name, tensor in fields.pop("inputs").items()}
        return Experience(inputs, **{name: tensor[index] for name, tensor in fields.items()})

    def chunks(self, rows: int) -> Iterator[Experience]:
        """All rows in order, so many at a time."""
        for start in range(0, len(self), rows):
            yield self.rows(slice(start, start + rows))


@torch.no_grad()
def evaluate(
    policy: nn.Module, inputs: Mapping[str, Tensor], actions: Tensor, *, rows: int = 32
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the actions and values (None without a value head) by a policy in eval mode, N × T each.

    rows: how many at a time.
    """
    log_probs, values = [], []
    with evaluating(policy):
        for start in range(0, len(actions), rows):
            part = slice(start, start + rows)
            logits, value = policy(**{name: tensor[part] for name, tensor in inputs.items()})
            log_probs.append(log_probs_of(logits, actions[part]))
            values.append(value)
    return torch.cat(log_probs), None if values[0] is None else torch.cat(values)


@torch.no_grad()
def compare(
    policy: nn.Module,
    reference: nn.Module,
    inputs: Mapping[str, Tensor],
    actions: Tensor,
    mask: Tensor,
    *,
    rows: int = 32,
) -> dict[str, Tensor | None]:
    """A policy beside its reference, both in eval mode, in one pass of each.

    log_probs, values: of the policy, as `evaluate` gives them. reference: log-probabilities of the actions under it.
    kl: of each row, KL(policy ‖ reference) summed over its steps, with every action that could have been taken.
    """
    found: dict[str, list[Tensor]] = {"log_probs": [], "values": [], "reference": [], "kl": []}
    with evaluating(policy), evaluating(reference):
        for start in range(0, len(actions), rows):
            part = slice(start, start + rows)
            given = {name: tensor[part] for name, tensor in inputs.items()}
            logits, values = policy(**given)
            before, _ = reference(**given)
            found["log_probs"].append(log_probs_of(logits, actions[part]))
            found["reference"].append(log_probs_of(before, actions[part]))
            if values is not None:
                found["values"].append(values)
            kl = categorical_kl(logits.log_softmax(-1), before.log_softmax(-1))
            found["kl"].append(torch.where(mask[part], kl, 0).sum(1))
    return {name: torch.cat(parts) if parts else None for name, parts in found.items()}
