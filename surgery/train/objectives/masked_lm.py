"""masked-lm: predict hidden tokens from the tokens around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Generator

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting
from surgery.train.objective import Batch
from surgery.train.texts import TEXT, text_of
from surgery.train.tokens import IGNORED, TokenObjective


class MaskedLm(TokenObjective):
    """Masked language modeling: the cross-entropy of hidden tokens (Devlin et al. 2019, arXiv:1810.04805).

    Each batch hides another random share of the tokens, except special ones. Of the chosen tokens 80% become the mask
    token, 10% become a random token and 10% stay unchanged. Long texts are split into pieces of --max-length. On
    held-out data the choice is the same in every evaluation. The metric is the perplexity, exp(loss).
    """

    name: ClassVar[str] = "masked-lm"
    example: ClassVar[str] = (
        "surgery train hf:google-bert/bert-base-uncased --task fill-mask --objective masked-lm --data "
        "texts.jsonl -o trained/"
    )
    heads: ClassVar[tuple[str, ...]] = ("fill-mask",)
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": TEXT}

    text: str | None = Field(default=None, description="column of the text")
    share: float = Field(default=0.15, gt=0, lt=1, description="share of the tokens to hide and predict")

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        if setting.need_tokenizer(self.name).mask_token_id is None:
            raise TrainingError(
                "objective 'masked-lm': the tokenizer has no mask token; use causal-lm instead"
            )
        return {}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        cut = {"truncation": True, "max_length": setting.longest, "return_overflowing_tokens": True}
        for ids in setting.tokenizer(text_of(row, setting), **cut)["input_ids"]:
            yield {"input_ids": ids}

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        inputs = setting.pad(examples)
        ids = inputs["input_ids"]
        special = torch.isin(ids, torch.tensor(setting.tokenizer.all_special_ids))
        chance = torch.rand(ids.shape, generator=draw).masked_fill(special, 2.0)
        chosen = chance < self.share
        if not chosen.any():  # a batch without a label would have no loss
            chosen = chance == chance.min()
        how = torch.rand(ids.shape, generator=draw)
        other = torch.randint(0, len(setting.tokenizer), ids.shape, generator=draw)
        hidden = torch.where(chosen & (how < 0.8), setting.tokenizer.mask_token_id, ids)
        inputs["input_ids"] = torch.where(chosen & (how >= 0.9), other, hidden)
        return {"inputs": inputs, "labels": torch.where(chosen, ids, IGNORED)}
