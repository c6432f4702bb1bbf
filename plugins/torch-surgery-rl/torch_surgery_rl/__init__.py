"""Reinforcement learning of surgery programs: PPO, TRPO, advantages, KL penalties, and rollouts of language models."""

from surgery.api import hookimpl
from torch_surgery_rl.estimates import gae, masked_mean, whiten
from torch_surgery_rl.experience import Experience, compare, evaluate
from torch_surgery_rl.judge import Judge
from torch_surgery_rl.kl import AdaptiveKL, categorical_kl, penalized_rewards, sequence_kl
from torch_surgery_rl.language import LanguagePolicy, Rollout, roll_out
from torch_surgery_rl.objectives import PpoObjective, TrpoObjective
from torch_surgery_rl.policy import trained
from torch_surgery_rl.ppo import PPO
from torch_surgery_rl.reward import of_program, on_texts, on_tokens, score
from torch_surgery_rl.trpo import TRPO, conjugate_gradient

__all__ = [
    "PPO",
    "TRPO",
    "AdaptiveKL",
    "Experience",
    "Judge",
    "LanguagePolicy",
    "PpoObjective",
    "Rollout",
    "TrpoObjective",
    "categorical_kl",
    "compare",
    "conjugate_gradient",
    "evaluate",
    "gae",
    "masked_mean",
    "of_program",
    "on_texts",
    "on_tokens",
    "penalized_rewards",
    "roll_out",
    "score",
    "sequence_kl",
    "surgery_objectives",
    "trained",
    "whiten",
]


@hookimpl
def surgery_objectives() -> list[type]:
    return [PpoObjective, TrpoObjective]
