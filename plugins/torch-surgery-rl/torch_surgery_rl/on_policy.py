"""Shared base of the objectives `ppo` and `trpo`: sample responses, compute rewards, update the policy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from surgery.api import Field
from surgery.api.programs import Program, TrainingError
from surgery.api.training import (
    FrozenPart,
    OnPolicy,
    Setting,
    chat_template,
    chat_tokens,
    messages_in,
    reference_of,
)
from torch_surgery_rl.estimates import masked_mean
from torch_surgery_rl.experience import Experience, compare
from torch_surgery_rl.judge import Judge
from torch_surgery_rl.kl import AdaptiveKL, penalized_rewards
from torch_surgery_rl.language import LanguagePolicy, roll_out
from torch_surgery_rl.policy import evaluating

Batch = dict[str, Any]


class LanguageObjective(OnPolicy):
    """Base of on-policy objectives of language models. A batch is a number of prompts.

    `complete` samples a response to each prompt from the live program with its KV cache, computes the reward, and
    compares the response with the reference policy: the program without its trained parts, in the same storage.
    """

    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("prompt", "instruction", "question", "text", "conversations", "messages")
    }
    metric: ClassVar[str] = "reward"
    larger: ClassVar[bool] = True

    prompt: str | None = Field(default=None, description="column of the prompt: texts, or lists of messages")
    template: str | None = Field(
        default=None, description="file with a chat template (Jinja), instead of the tokenizer's"
    )
    plain: bool = Field(
        default=False, description="use no chat template: the response continues the text of the prompt"
    )
    reward: str = Field(
        default="",
        description="source of rewards: a directory or reference of a program with one score or with classes, or "
        "MODULE:FUNCTION, called with lists of prompts and of responses",
    )
    reward_class: int | None = Field(
        default=None, ge=0, description="class of the reward program whose log-probability is the reward"
    )
    reads: Literal["whole", "response"] = Field(
        default="whole",
        description="text that a reward program with its own tokenizer reads: with the prompt, or the response alone",
    )
    new_tokens: int = Field(default=32, gt=0, description="maximum tokens of a response")
    temperature: float = Field(default=1.0, gt=0, description="temperature of sampling and of the policy")
    kl: float = Field(
        default=0.05,
        ge=0,
        description="weight of the penalty on each token's log-ratio to the reference policy",
    )
    kl_target: float | None = Field(
        default=None,
        gt=0,
        description="target KL of a response, to which the penalty adapts (default: fixed penalty)",
    )
    kl_gain: float = Field(default=0.1, gt=0, description="speed of the adaptation to --kl-target")
    gamma: float = Field(default=1.0, ge=0, le=1, description="discount of later rewards")
    lam: float = Field(default=0.95, ge=0, le=1, description="λ of generalized advantage estimation")
    value: str = Field(default="logits_value", description="output with the value of each token")
    minibatch: int = Field(default=8, gt=0, description="responses per minibatch (in memory at a time)")

    # -- data

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        setting.need_tokenizer(self.name)
        if setting.widths.get(self.value) != 1:
            raise TrainingError(
                f"objective {self.name!r}: the model has no output {self.value!r} with one value per token; add one "
                f"with --pass head --mode add --labels 1 --head-name value --pool none --init zero"
            )
        if "logits" not in setting.widths or setting.fixed is not None:
            raise TrainingError(
                f"objective {self.name!r} needs a language model that accepts any length; use another model"
            )
        if self.plain:
            return {"template": None}
        return {"template": chat_template(self.name, self.template, setting, ", or use --plain")}

    def examples(self, row: Mapping[str, Any], setting: Setting) -> Iterable[dict[str, Any]]:
        column = setting.columns["prompt"]
        asked = messages_in(row[column], "user", column)
        if setting.decided["template"] is None:
            ids = list(setting.tokenizer("".join(m["content"] for m in asked))["input_ids"])
        else:
            ids = chat_tokens(asked, setting, add_generation_prompt=True)
        if not ids:
            setting.count("is empty and was skipped")
        elif len(ids) + self.new_tokens > setting.longest:
            setting.count(f"leaves fewer than {self.new_tokens} of {setting.longest} tokens and was skipped")
        else:
            yield {"input_ids": ids}

    def collate(self, examples: Sequence[Mapping[str, Any]], setting: Setting, draw: Generator) -> Batch:
        return {
            "inputs": setting.pad(examples),
            "prompts": [list(example["input_ids"]) for example in examples],
            "reader": setting.tokenizer,
            "seed": int(torch.randint(2**62, (), generator=draw)),
        }

    def terms(self, batch: Batch) -> int:
        return len(batch["prompts"])

    # -- acting

    def companions(self, program: Program) -> Mapping[str, nn.Module]:
        """Return the modules of a step.

        live samples the responses. policy is the module that is trained. reference is the program without its trained
        parts. judge computes the rewards. frozen, if possible, caches the layers below everything that is trained.
        """
        # A live model cannot hold an added head, and sampling does not need one.
        heads = [e.id for e in program.journal if e.pass_name == "head" and e.options.get("mode") == "add"]
        reference = reference_of(program)
        found: dict[str, nn.Module] = {
            "live": program.without(*heads).live(),
            "policy": program.module(),
            "reference": reference.graph_module,
            "judge": Judge.of(self.reward, self.reward_class, self.reads),
        }
        frozen = FrozenPart.of(program, [reference], narrow="logits")
        return {**found, "frozen": frozen} if frozen is not None else found

    @torch.no_grad()
    def complete(self, batch: Batch, companions: Mapping[str, nn.Module]) -> Batch:
        read, live = batch["reader"], companions["live"]
        ends = _numbers(live.generation_config.eos_token_id) + _numbers(read.eos_token_id)
        with torch.random.fork_rng():
            torch.manual_seed(batch["seed"])
            rollout = roll_out(
                live, batch["prompts"], self.new_tokens, temperature=self.temperature,
                eos=list(dict.fromkeys(ends)), pad=read.pad_token_id,
            )  # fmt: skip
        scores = companions["judge"](rollout, read)
        inputs = {name: rollout.inputs[name] for name in ("input_ids", "attention_mask")}
        policy, reference, kept = companions["policy"], companions["reference"], {}
        if isinstance(frozen := companions.get("frozen"), FrozenPart):
            (policy, reference), kept = frozen.tails, frozen.run(inputs, self.minibatch)
        seen = compare(
            self.policy(policy), self.policy(reference), {**rollout.inputs, **kept}, rollout.actions, rollout.mask,
            rows=self.minibatch,
        )  # fmt: skip
        tail = {"tail": policy, "kept": kept} if kept else {}
        return {**batch, "inputs": inputs, "rollout": rollout, "scores": scores, **seen, **tail}

    def policy(self, module: nn.Module) -> LanguagePolicy:
        """Wrap a module as a policy."""
        return LanguagePolicy(module, value=self.value, temperature=self.temperature)

    def experience(self, batch: Batch, coefficient: float | None = None) -> Experience:
        """Return the experience of a completed batch. `coefficient` weights the KL penalty (default: --kl)."""
        rollout, taken = batch["rollout"], batch["log_probs"]
        beta = self.kl if coefficient is None else coefficient
        rewards = penalized_rewards(batch["scores"], taken, batch["reference"], rollout.mask, beta)
        return Experience.of(
            rollout.inputs, rollout.actions, rollout.mask, rewards, taken, batch["values"], gamma=self.gamma,
            lam=self.lam,
        )  # fmt: skip

    # -- learning

    def improve(
        self, module: nn.Module, batch: Batch, optimizer: Optimizer, clip: float, kept: dict[str, float]
    ) -> dict[str, float]:
        coefficient = kept.setdefault("kl_coefficient", self.kl)
        experience, policy = self.experience(batch, coefficient), self.policy(batch.get("tail", module))
        experience = replace(experience, inputs={**experience.inputs, **batch.get("kept", {})})
        with evaluating(policy):
            done = self.update(policy, experience, optimizer, clip, batch["seed"])
        kl, mask = float(batch["kl"].mean()), experience.mask
        if self.kl_target is not None:
            kept["kl_coefficient"] = AdaptiveKL(coefficient, self.kl_target, self.kl_gain).update(kl)
        return {
            "reward": float(batch["scores"].mean()),
            "kl": kl,
            "kl_coefficient": coefficient,
            "value_error": float(masked_mean((experience.values - experience.returns) ** 2, mask)),
            "length": float(mask.sum(1).double().mean()),
            **done,
        }

    @abstractmethod
    def update(
        self, policy: LanguagePolicy, experience: Experience, optimizer: Optimizer, clip: float, seed: int
    ) -> dict[str, float]:
        """Update the policy.

        Args:
            policy: the policy.
            experience: experience to learn from.
            optimizer: optimizer of all trained parameters.
            clip: maximum norm of the gradient.
            seed: seed of random choices in the update.

        Returns:
            Figures to log, including `loss`.
        """

    # -- held-out prompts

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"reward": batch["scores"], "kl": batch["kl"], "length": batch["rollout"].mask.sum(1)}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean reward, the mean KL to the reference policy, and the mean length of a response."""
        return {name: float(values.double().mean()) for name, values in observed.items()}


def _numbers(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)
