"""The objectives `ppo` and `trpo` of `surgery train`."""

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
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) of a language model.

    Each step samples a batch of responses from the live program with its KV cache, computes their rewards, and
    estimates advantages with GAE (Schulman et al. 2016, arXiv:1506.02438) from a value head that a pass added. It
    then maximizes the clipped surrogate over several epochs of minibatches (see torch_surgery_rl.PPO). A KL penalty
    lowers the reward of each token by its log-ratio to the reference policy, which is the program without its trained
    parts, in the same storage. --kl-target makes the penalty adaptive (Ziegler et al. 2019, arXiv:1909.08593).

    Rows are prompts. --reward is a program trained with `reward`, any program with one score or with classes, or a
    function of texts. The metrics on held-out prompts are the mean reward, the KL of a response to the reference
    policy (exact over all tokens at each step, summed over the response), and the length. The best checkpoint has the
    highest reward. The log contains these figures for each step, with the clipped share and the KL of the update.
    """

    name: ClassVar[str] = "ppo"
    example: ClassVar[str] = (
        "surgery train hf:google-bert/bert-base-uncased --task text-classification --objective "
        "classification --data reviews.csv -o judge/\n"
        'surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass lora --target "attn.*" --pass head --mode '
        "add --labels 1 --head-name value --pool none --init zero -o policy/\n"
        "surgery train policy/ --objective ppo --reward judge/ --reward-class 1 --data prompts.jsonl "
        "--plain -o tuned/"
    )

    ratio_clip: float = Field(default=0.2, gt=0, description="ε of the clipped ratio")
    value_clip: float | None = Field(default=0.2, gt=0, description="maximum change of a value in one update")
    value_weight: float = Field(default=0.5, ge=0, description="weight of the value error in the loss")
    entropy: float = Field(default=0.0, ge=0, description="weight of the entropy bonus")
    inner_epochs: int = Field(default=4, gt=0, description="epochs over a batch of responses")
    update_kl: float | None = Field(
        default=None,
        gt=0,
        description="end a step early if the mean KL per token from the old policy exceeds this",
    )

    def algorithm(self, clip: float = 1.0) -> PPO:
        """Return PPO with these options. `clip` is the maximum norm of the gradient."""
        return PPO(
            self.ratio_clip, self.value_clip, self.value_weight, self.entropy, self.inner_epochs, self.minibatch, clip,
            self.update_kl,
        )  # fmt: skip

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of PPO on a completed batch, with the initial KL coefficient."""
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
    """Trust region policy optimization (Schulman et al. 2015, arXiv:1502.05477) of a language model.

    Responses, rewards and advantages are those of `ppo`. Each step is one natural-gradient step, by conjugate
    gradients on Fisher-vector products. A line search keeps the mean KL per token from the old policy within --max-kl
    (see torch_surgery_rl.TRPO). The value head is fitted to the returns separately, with learning rate --lr; the
    policy step uses no learning rate.

    Rows, rewards and metrics are those of `ppo`. The log contains the KL of each update and the accepted fraction of
    the full step.
    """

    name: ClassVar[str] = "trpo"
    example: ClassVar[str] = (
        "surgery train hf:google-bert/bert-base-uncased --task text-classification --objective "
        "classification --data reviews.csv -o judge/\n"
        'surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass lora --target "attn.*" --pass head --mode '
        "add --labels 1 --head-name value --pool none --init zero -o policy/\n"
        "surgery train policy/ --objective trpo --reward judge/ --reward-class 1 --data prompts.jsonl "
        "--plain -o tuned/"
    )

    max_kl: float = Field(default=0.01, gt=0, description="bound of the mean KL per token in one step")
    damping: float = Field(
        default=0.1, ge=0, description="damping, added to the diagonal of the Fisher matrix"
    )
    iterations: int = Field(default=10, gt=0, description="iterations of conjugate gradients")
    backtracks: int = Field(default=15, gt=0, description="maximum tries of the line search")
    value_epochs: int = Field(default=4, gt=0, description="epochs of fitting the values to a batch")
    fisher_rows: int | None = Field(
        default=None, gt=0, description="responses of a batch used for the Fisher matrix (default: all)"
    )

    @property
    def algorithm(self) -> TRPO:
        """TRPO with these options."""
        return TRPO(
            self.max_kl, self.damping, self.iterations, self.backtracks, minibatch=self.minibatch,
            fisher_rows=self.fisher_rows,
        )  # fmt: skip

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the negative surrogate of a completed batch, with the initial KL coefficient."""
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
