"""causal-lm: predict each token from the tokens before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Generator

from surgery.train.data_context import Row, Setting
from surgery.train.objective import Batch
from surgery.train.packing import PackingObjective
from surgery.train.texts import TEXT, text_of
from surgery.train.tokens import next_tokens


class CausalLm(PackingObjective):
    """Causal language modeling: the mean cross-entropy of each token given the tokens before it.

    On texts of one domain this is continued pretraining (Gururangan et al. 2020, arXiv:2004.10964). Each text ends
    with the tokenizer's end token. A text longer than --max-length is split into pieces of that length. A piece never
    spans two texts, so no token is predicted from another text. The metric is the perplexity, exp(loss).
    """

    name: ClassVar[str] = "causal-lm"
    example: ClassVar[str] = (
        "surgery train hf:HuggingFaceTB/SmolLM2-135M --objective causal-lm --data texts.jsonl -o trained/"
    )
    heads: ClassVar[tuple[str, ...]] = ("text-generation",)
    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": TEXT}

    text: str | None = Field(default=None, description="column of the text")
    end: bool = Field(default=True, description="add the tokenizer's end token to each text")

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        setting.need_tokenizer(self.name)
        return {}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        ids = list(setting.tokenizer(text_of(row, setting))["input_ids"])
        end = setting.tokenizer.eos_token_id
        if self.end and end is not None and ids[-1:] != [end]:
            ids.append(end)
        if len(ids) < 2:
            setting.count("has fewer than two tokens and was skipped")
        for start in range(0, len(ids), setting.longest):
            piece = ids[start : start + setting.longest]
            if len(piece) > 1:
                yield self.examples_of(piece, next_tokens(piece))

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        return self.labelled(examples, setting)
