"""ppo and trpo, as objectives of `surgery train`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.api import Field
from torch_surgery_rl.estimates import masked_mean
from torch_surgery_rl.experience import Experience
from torch_surgery_rl.language import LanguagePolicy
from torch_surgery_rl.on_policy import Batch, LanguageObjective
from torch_surgery_rl.policy import log_probs_of
from torch_surgery_rl.ppo import PPO
from torch_surgery_rl.trpo import TRPO


class PpoObjective(LanguageObjective):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) of a language model: each step samples a
    batch of responses (with a cache, from the live program), has them rewarded, estimates advantages (GAE, Schulman et
    al. 2016, arXiv:1506.02438) by a value head that a pass grafted, and climbs the clipped surrogate in several epochs
    of minibatches (see torch_surgery_rl.PPO). Each token pays for its log-ratio to the reference policy, which is the
    program without what trains, in the same storage; --kl-target lets the price adapt (Ziegler et al. 2019,
    arXiv:1909.08593).

    Rows are prompts; --reward is a program that was trained with `reward`, any program with one score or with classes,
    or a function of texts. The figures of held-out prompts are the mean reward, the KL of a response to the reference
    policy (of every token that could have come, summed over the response), and its length; the best checkpoint is of
    the highest reward. The log has these of each step, and the clipped share and the KL of the update.
    """

    name: ClassVar[str] = "ppo"

    ratio_clip: float = Field(0.2, gt=0, description="ε of the clipped ratio")
    value_clip: float | None = Field(0.2, gt=0, description="how far a value moves from what it was")
    value_weight: float = Field(0.5, ge=0, description="of the values' error in the loss")
    entropy: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    inner_epochs: int = Field(4, gt=0, description="how often a batch of responses is read")
    update_kl: float | None = Field(
        None,
        gt=0,
        description="end a step early where its KL from the old policy, for each token, passes this",
    )

    def algorithm(self, clip: float = 1.0) -> PPO:
        """PPO with these options. clip: largest norm of the gradient."""
        return PPO(
            self.ratio_clip, self.value_clip, self.value_weight, self.entropy, self.inner_epochs, self.minibatch, clip,
            self.update_kl,
        )  # fmt: skip

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """PPO's loss of a completed batch, under the penalty at the start."""
        experience = self.experience(batch)
        logits, values = self.policy(module)(**experience.inputs)
        assert values is not None
        return self.algorithm().loss(logits, values, experience)[0]

    def update(
        self, policy: LanguagePolicy, experience: Experience, optimizer: Optimizer, clip: float, seed: int
    ) -> dict[str, float]:
        order = torch.Generator().manual_seed(seed)
        seen = self.algorithm(clip).update(policy, experience, optimizer, generator=order)
        loss = seen["policy"] + self.value_weight * seen["value"] - self.entropy * seen["entropy"]
        told = {"update_kl": seen["kl"], "clipped": seen["clipped"], "entropy": seen["entropy"]}
        return {"loss": loss, **told}


class TrpoObjective(LanguageObjective):
    """Trust region policy optimisation (Schulman et al. 2015, arXiv:1502.05477) of a language model: responses, rewards
    and advantages as in `ppo`, and then one natural-gradient step by conjugate gradients on Fisher-vector products,
    with a line search that keeps the mean KL of a token from the old policy within --max-kl (see
    torch_surgery_rl.TRPO). --lr is that of the value head, which is fitted to the returns beside it; the policy takes
    no rate.

    Rows, rewards and figures are those of `ppo`. The log has the KL of each update and which part of the full step was
    taken.
    """

    name: ClassVar[str] = "trpo"

    max_kl: float = Field(0.01, gt=0, description="bound of a step's mean KL for each token")
    damping: float = Field(0.1, ge=0, description="added to the Fisher matrix's diagonal")
    iterations: int = Field(10, gt=0, description="of conjugate gradients")
    backtracks: int = Field(15, gt=0, description="tries of the line search")
    value_epochs: int = Field(4, gt=0, description="how often the values are fitted to a batch")
    fisher_rows: int | None = Field(
        None, gt=0, description="responses of a batch that the Fisher matrix is of (default: all)"
    )

    @property
    def algorithm(self) -> TRPO:
        """TRPO with these options."""
        return TRPO(
            self.max_kl, self.damping, self.iterations, self.backtracks, minibatch=self.minibatch,
            fisher_rows=self.fisher_rows,
        )  # fmt: skip

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The negative of the surrogate of a completed batch, under the penalty at the start."""
        experience = self.experience(batch)
        logits, _ = self.policy(module)(**experience.inputs)
        ratio = (log_probs_of(logits, experience.actions) - experience.log_probs).exp()
        return -masked_mean(ratio * experience.advantages, experience.mask)

    def update(
        self, policy: LanguagePolicy, experience: Experience, optimizer: Optimizer, clip: float, seed: int
    ) -> dict[str, float]:
        done = self.algorithm.update(policy, experience)
        self.algorithm.fit_values(policy, experience, optimizer, epochs=self.value_epochs)
        return {"loss": -done["improvement"], "update_kl": done["kl"], "step": done["step"]}
