"""Objectives, their data and the training loop."""

from __future__ import annotations

from surgery.train.data import read_rows, split
from surgery.train.data_context import Setting
from surgery.train.dialogues import chat_template, chat_tokens, messages_in
from surgery.train.frozen_part import FrozenPart
from surgery.train.learned import LEARNED, Learned
from surgery.train.loop import train
from surgery.train.objective import Objective, OnPolicy
from surgery.train.objectives.classification import Classification
from surgery.train.objectives.regression import Regression
from surgery.train.options import Settings
from surgery.train.reference_policy import reference_of
from surgery.train.registry import find_objective, objectives
from surgery.train.tables import joined
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tokens import TokenObjective

__all__ = [
    "LEARNED",
    "Classification",
    "FrozenPart",
    "Learned",
    "Objective",
    "OnPolicy",
    "Regression",
    "Setting",
    "Settings",
    "TokenObjective",
    "chat_template",
    "chat_tokens",
    "find_objective",
    "find_tokenizer",
    "joined",
    "messages_in",
    "objectives",
    "read_rows",
    "reference_of",
    "split",
    "train",
]
