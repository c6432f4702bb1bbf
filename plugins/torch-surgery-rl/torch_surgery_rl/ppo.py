"""Proximal policy optimisation."""

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
    """PPO (Schulman et al. 2017, arXiv:1707.06347): several epochs of minibatches on one batch of experience, on

        L = −mean min(ρ A, clip(ρ, 1−ε, 1+ε) A) + c₁ · mean max((V−R)², (V'−R)²) / 2 − c₂ · mean H(π)

    with ρ = π(a|s) / π_old(a|s), and V' the value clipped to within `value_clip` of the one it had (None: not).
    The mean is over the actions of a minibatch. Keep dropout off (eval mode), so that ρ starts at one.

    minibatch: rows. max_grad_norm: the gradient is clipped to it. max_kl: the epochs end early where the mean KL of a
    step from the old policy, as estimated on the minibatch, has passed it (None: they do not).
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
                raise SurgeryError(f"PPO: {name} is {getattr(self, name)}, and has to be above 0")

    def loss(
        self, logits: Tensor, values: Tensor, experience: Experience
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L, and its parts: what the policy, values and entropy are, the estimated KL, the share of ratios clipped."""
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
        """Train the policy on a batch of experience; returns the means of `loss`'s parts over the steps taken.

        generator: of the order of the rows. Raises SurgeryError where nothing trains, and for a loss or a gradient
        that is not finite, before that minibatch changes anything.
        """
        ours = {id(parameter) for parameter in trained(policy)}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if ours.isdisjoint(map(id, parameters)):
            raise SurgeryError("the optimizer has none of the parameters of the policy that train")
        seen: list[dict[str, Tensor]] = []
        for epoch in range(self.epochs):
            order = torch.randperm(len(experience), generator=generator).to(experience.actions.device)
            for rows in order.split(self.minibatch):
                part = experience.rows(rows)
                logits, values = policy(**part.inputs)
                loss, parts = self.loss(logits, values, part)
                if not loss.isfinite():
                    raise SurgeryError(
                        f"the loss of PPO is {loss.item()} in epoch {epoch}, rows {rows.tolist()}"
                    )
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                if not norm.isfinite():
                    raise SurgeryError(
                        f"a gradient of PPO is {norm.item()} in epoch {epoch}, rows {rows.tolist()}"
                    )
                optimizer.step()
                seen.append(parts)
            if self.max_kl is not None and seen[-1]["kl"] > self.max_kl:
                break
        means = {name: float(torch.stack([parts[name] for parts in seen]).mean()) for name in seen[0]}
        return {**means, "steps": float(len(seen))}
