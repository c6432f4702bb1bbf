"""The built-in objectives, registered through the same hook as those of plugins."""

from __future__ import annotations

from surgery.common.hooks import hookimpl
from surgery.common.plugins import check_classes
from surgery.train.objective import Objective
from surgery.train.objectives.causal_lm import CausalLm
from surgery.train.objectives.classification import Classification
from surgery.train.objectives.contrastive import Contrastive
from surgery.train.objectives.distill import Distill
from surgery.train.objectives.dpo import Dpo
from surgery.train.objectives.masked_lm import MaskedLm
from surgery.train.objectives.multi_task import MultiTask
from surgery.train.objectives.regression import Regression
from surgery.train.objectives.reward import Reward
from surgery.train.objectives.sft import Sft


@hookimpl
def surgery_objectives() -> list[type]:
    return [Classification, Regression, CausalLm, MaskedLm, Sft, Reward, Dpo, Contrastive, Distill, MultiTask]


def _check_objectives(given: object) -> None:
    check_classes(given, "surgery_objectives", Objective)


CHECKS_OF_HOOKS = {"surgery_objectives": _check_objectives}

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
