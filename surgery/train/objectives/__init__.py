"""Built-in objectives, registered through the same hook as everybody's."""

from __future__ import annotations

from surgery.hookspecs import hookimpl
from surgery.training.objectives.causal_lm import CausalLm
from surgery.training.objectives.classification import Classification
from surgery.training.objectives.contrastive import Contrastive
from surgery.training.objectives.distill import Distill
from surgery.training.objectives.dpo import Dpo
from surgery.training.objectives.masked_lm import MaskedLm
from surgery.training.objectives.multi_task import MultiTask
from surgery.training.objectives.regression import Regression
from surgery.training.objectives.reward import Reward
from surgery.training.objectives.sft import Sft


@hookimpl
def surgery_objectives() -> list[type]:
    return [Classification, Regression, CausalLm, MaskedLm, Sft, Reward, Dpo, Contrastive, Distill, MultiTask]


__all__ = [
    "CausalLm",
    "Classification",
    "Contrastive",
    "Distill",
    "Dpo",
    "MaskedLm",
    "MultiTask",
    "Regression",
    "Reward",
    "Sft",
    "surgery_objectives",
]
