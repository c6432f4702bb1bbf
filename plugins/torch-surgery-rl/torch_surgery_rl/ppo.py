"""Proximal policy optimization (PPO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.api import SurgeryError
from torch_surgery_rl.estimates import masked_mean
from torch_surgery_rl.experience import Experience
from torch_surgery_rl.policy import log_probs_of, trained


@dataclass(frozen=True)
class PPO:
    """PPO (Schulman et al. 2017, arXiv:1707.06347): several epochs of minibatches on one batch of experience.

    The loss is

        L = −mean min(ρ A, clip(ρ, 1−ε, 1+ε) A) + c₁ · mean max((V−R)², (V'−R)²) / 2 − c₂ · mean H(π)

    with ρ = π(a|s) / π_old(a|s), and V' the value clipped to within `value_clip` of the old value. Means are over the
    actions of a minibatch. Keep dropout off (eval mode), so that ρ starts at one.

    Attributes:
        clip: ε.
        value_clip: maximum change of a value (None: no clipping).
        value_weight: c₁.
        entropy_weight: c₂.
        epochs: epochs over the experience.
        minibatch: rows per optimizer step.
        max_grad_norm: maximum norm of the gradient.
        max_kl: end the epochs early if the mean KL per action from the old policy, estimated on the last minibatch,
            exceeds this (None: never).
    """

    clip: float = 0.2
    value_clip: float | None = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.0
    epochs: int = 4
    minibatch: int = 8
    max_grad_norm: float = 1.0
    max_kl: float | None = None

    def __post_init__(self) -> None:
        for name in ("clip", "epochs", "minibatch", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise SurgeryError(f"PPO: {name} is {getattr(self, name)}; pass a number above 0")

    def loss(
        self, logits: Tensor, values: Tensor, experience: Experience
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and its parts for logging.

        Args:
            logits: N × T × actions, of the current policy.
            values: N × T, of the current policy.
            experience: N rows of experience.

        Returns:
            The loss L, and its parts without gradients: policy, value and entropy terms, the estimated KL, and the
            share of clipped ratios.
        """
        mask, advantages = experience.mask, experience.advantages
        log_probs = log_probs_of(logits, experience.actions)
        log_ratio = torch.where(mask, log_probs - experience.log_probs, 0)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        policy = -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)
        error = (values - experience.returns) ** 2
        if self.value_clip is not None:
            moved = (values - experience.values).clamp(-self.value_clip, self.value_clip)
            error = torch.maximum(error, (experience.values + moved - experience.returns) ** 2)
        value = masked_mean(error, mask) / 2
        with torch.set_grad_enabled(self.entropy_weight != 0 and torch.is_grad_enabled()):
            entropy = masked_mean(torch.distributions.Categorical(logits=logits).entropy(), mask)
        loss = policy + self.value_weight * value - self.entropy_weight * entropy
        with torch.no_grad():
            # An unbiased estimate of the KL from samples that is never negative.
            kl = masked_mean(ratio - 1 - log_ratio, mask)
            beyond = masked_mean((ratio != clipped).to(ratio.dtype), mask)
        parts = {"policy": policy, "value": value, "entropy": entropy, "kl": kl, "clipped": beyond}
        return loss, {name: part.detach() for name, part in parts.items()}

    def update(
        self,
        policy: nn.Module,
        experience: Experience,
        optimizer: torch.optim.Optimizer,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, float]:
        """Train the policy on a batch of experience.

        A minibatch with a loss or gradient that is not finite changes nothing.

        Args:
            policy: the policy.
            experience: experience to learn from.
            optimizer: optimizer of the policy's parameters.
            generator: generator of the row order.

        Returns:
            The parts of `loss`, averaged over the steps, and the number of steps.

        Raises:
            SurgeryError: nothing is trainable, or a loss or gradient is not finite.
        """
        ours = {id(parameter) for parameter in trained(policy)}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if ours.isdisjoint(map(id, parameters)):
            raise SurgeryError("the optimizer has no trainable parameter of the policy; pass these to it")
        seen: list[dict[str, Tensor]] = []
        for epoch in range(self.epochs):
            order = torch.randperm(len(experience), generator=generator).to(experience.actions.device)
            for rows in order.split(self.minibatch):
                part = experience.rows(rows)
                logits, values = policy(**part.inputs)
                loss, parts = self.loss(logits, values, part)
                if not loss.isfinite():
                    raise SurgeryError(
                        f"the loss of PPO is {loss.item()} in epoch {epoch}, rows {rows.tolist()}; "
                        f"lower the learning rate"
                    )
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                if not norm.isfinite():
                    raise SurgeryError(
                        f"the norm of PPO's gradient is {norm.item()} in epoch {epoch}, rows {rows.tolist()}; "
                        f"lower the learning rate"
                    )
                optimizer.step()
                seen.append(parts)
            if self.max_kl is not None and seen[-1]["kl"] > self.max_kl:
                break
        means = {name: float(torch.stack([parts[name] for parts in seen]).mean()) for name in seen[0]}
        return {**means, "steps": float(len(seen))}
