"""Batches of episodes that PPO and TRPO learn from: actions, log-probabilities, values, advantages and returns."""

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
    """N episodes of up to T actions. All tensors but the inputs are N × T.

    Attributes:
        inputs: inputs of the policy, each with N rows.
        actions: the actions taken.
        mask: True for actions, False for padding.
        log_probs: log-probabilities of the actions under the policy that acted.
        values: values of the policy that acted.
        advantages: estimated advantages, see `of`.
        returns: targets of the values, see `of`.
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
        """Make experience from rewards, with advantages by GAE.

        Args:
            inputs: inputs of the policy, each with N rows.
            actions: N × T.
            mask: N × T, boolean, True for actions.
            rewards: N × T.
            log_probs: N × T, from `evaluate`.
            values: N × T, from `evaluate`.
            gamma: discount.
            lam: λ of GAE.
            last_values: values after truncated episodes, see `gae`.
            whitened: normalize the advantages over the batch.

        Raises:
            SurgeryError: there are no values, a row has no action, the shapes differ, or a value is not finite.
        """
        if values is None:
            raise SurgeryError(
                "the policy has no values; add a value head with surgery.Head(mode='add', labels=1, "
                "head_name='value', pool='none')"
            )
        same_shape(actions=actions, mask=mask, rewards=rewards, log_probs=log_probs, values=values)
        if mask.dtype != torch.bool:
            raise SurgeryError(f"the mask has dtype {mask.dtype}; pass torch.bool")
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        if empty or not len(mask):
            raise SurgeryError(
                f"row {empty[0]} has no action (an empty response); drop it"
                if empty
                else "there are no rows; pass some"
            )
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
        """Select rows."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        inputs = {name: tensor[index] for name, tensor in fields.pop("inputs").items()}
        return Experience(inputs, **{name: tensor[index] for name, tensor in fields.items()})

    def chunks(self, rows: int) -> Iterator[Experience]:
        """Yield all rows in order, in chunks of at most `rows`."""
        for start in range(0, len(self), rows):
            yield self.rows(slice(start, start + rows))


@torch.no_grad()
def evaluate(
    policy: nn.Module, inputs: Mapping[str, Tensor], actions: Tensor, *, rows: int = 32
) -> tuple[Tensor, Tensor | None]:
    """Compute log-probabilities and values of a policy in eval mode.

    Args:
        policy: the policy.
        inputs: its inputs, each with N rows.
        actions: N × T.
        rows: rows per forward pass.

    Returns:
        Log-probabilities of the actions and values (None without a value head), N × T each.
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
    """Evaluate a policy and its reference in eval mode, with one forward pass each.

    Args:
        policy: the policy.
        reference: the reference policy.
        inputs: inputs of both, each with N rows.
        actions: N × T.
        mask: N × T, True for actions.
        rows: rows per forward pass.

    Returns:
        log_probs, values: those of the policy, as from `evaluate`. reference: log-probabilities of the actions under
        the reference. kl: KL(policy ‖ reference) of each row, exact over all actions and summed over its steps.
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
