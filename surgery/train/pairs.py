"""Preference pairs: two answers to one prompt, one of them preferred. Base of `reward` and `dpo`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting, padded
from surgery.train.dialogues import Message, answered, chat_template, messages_in
from surgery.train.objective import Batch, Objective
from surgery.train.tokens import IGNORED, next_tokens


class PairObjective(Objective):
    """Base of objectives on preference pairs.

    A batch of B pairs has 2 B rows, with the chosen answers first. `labels` are those of TokenObjective, and `last`
    is the position of the last token of each row.
    """

    guesses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("prompt", "instruction", "question", "conversations", "messages"),
        "chosen": ("chosen", "preferred", "accepted"),
        "rejected": ("rejected", "dispreferred", "refused"),
    }

    prompt: str | None = Field(default=None, description="column of the prompt: texts, or lists of messages")
    chosen: str | None = Field(
        default=None, description="column of the preferred answer: texts, or lists of messages"
    )
    rejected: str | None = Field(default=None, description="column of the rejected answer")
    template: str | None = Field(
        default=None, description="file with a chat template (Jinja), instead of the tokenizer's"
    )
    plain: bool = Field(
        default=False, description="use no chat template: the answer continues the text of the prompt"
    )
    max_prompt: int | None = Field(
        default=None, gt=0, description="maximum tokens of a prompt; a longer prompt loses its first tokens"
    )

    def columns(self, available: Sequence[str]) -> dict[str, str]:
        found = self.named_columns(available)
        for option in ("chosen", "rejected"):
            if option not in found:
                raise TrainingError(
                    f"objective {self.name!r}: no column looks like the {option} answer; the data has "
                    f"{', '.join(available)}; name one with --{option}"
                )
        return found

    def decide(self, rows: Any, setting: Setting) -> dict[str, Any]:
        if self.plain:
            setting.need_tokenizer(self.name)
            return {"template": None}
        return {"template": chat_template(self.name, self.template, setting, ", or use --plain")}

    def examples(self, row: Row, setting: Setting) -> Iterable[Row]:
        prompt, *answers = self._messages(row, setting)
        made: dict[str, list[int]] = {}
        for kind, answer in zip(("chosen", "rejected"), answers, strict=True):
            ids, labels = self._tokens(prompt, answer, setting)
            over = 0 if self.max_prompt is None else _asked(labels) - self.max_prompt
            if over > 0:
                ids, labels = ids[over:], labels[over:]
                # Both answers share the prompt, so a cut prompt is counted once.
                if kind == "chosen":
                    setting.count(f"has a prompt that was cut to its last {self.max_prompt} tokens")
            if len(ids) > setting.longest:
                setting.count(f"has a {kind} answer that exceeds {setting.longest} tokens and was cut")
            made[kind], labels = ids[: setting.longest], next_tokens(labels[: setting.longest])
            made[f"{kind}_labels"] = labels
        if any(all(label == IGNORED for label in made[f"{kind}_labels"]) for kind in ("chosen", "rejected")):
            setting.count(f"has no answer within {setting.longest} tokens and was skipped")
        elif made["chosen"] == made["rejected"]:
            setting.count(f"has answers that are equal within {setting.longest} tokens and was skipped")
        else:
            yield made

    def size(self, example: Row) -> int:
        return max(len(example["chosen"]), len(example["rejected"]))

    def collate(self, examples: Sequence[Row], setting: Setting, draw: Generator) -> Batch:
        kinds = ("chosen", "rejected")
        rows = [{"input_ids": e[kind], "labels": e[f"{kind}_labels"]} for kind in kinds for e in examples]
        inputs = setting.pad(rows)
        length = inputs["input_ids"].shape[1]
        return {
            "inputs": inputs,
            "labels": padded([row["labels"] for row in rows], IGNORED, length),
            "last": torch.tensor([len(row["input_ids"]) - 1 for row in rows]),
        }

    def terms(self, batch: Batch) -> int:
        return len(batch["labels"]) // 2

    def _messages(self, row: Row, setting: Setting) -> tuple[list[Message], list[Message], list[Message]]:
        """Return the messages of the prompt, the chosen and the rejected answer.

        Without a prompt column, the prompt is the common start of both dialogues.
        """
        columns = setting.columns
        chosen, rejected = (
            messages_in(row[columns[k]], "assistant", columns[k]) for k in ("chosen", "rejected")
        )
        if "prompt" in columns:
            prompt = messages_in(row[columns["prompt"]], "user", columns["prompt"])
        else:
            shared = 0
            while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
                shared += 1
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            if not messages or messages[0]["role"] != "assistant":
                raise TrainingError(
                    f"column {columns[name]!r} contains no answer: its first message after the prompt is not the "
                    f"assistant's; fix the data"
                )
        return prompt, chosen, rejected

    def _tokens(
        self, prompt: list[Message], answer: list[Message], setting: Setting
    ) -> tuple[list[int], list[int]]:
        """Return tokens and labels of a prompt and an answer, up to the end token.

        The end token is the last one that a policy would sample, so text the template adds after it is dropped.
        """
        read, end = setting.tokenizer, setting.tokenizer.eos_token_id
        if setting.decided["template"] is None:
            asked = list(read("".join(m["content"] for m in prompt))["input_ids"])
            text = "".join(m["content"] for m in answer)
            ids = [*read(text, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]
            return asked + ids, [IGNORED] * len(asked) + ids
        ids, labels = answered([*prompt, *answer], setting, self.name, len(prompt))
        if end in labels:
            length = len(labels) - labels[::-1].index(end)
            ids, labels = ids[:length], labels[:length]
        return ids, labels


def _asked(labels: Sequence[int]) -> int:
    """Return the number of tokens before the answer."""
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def pair_accuracy(margin: Tensor) -> float:
    """Return the share of pairs with a positive margin. A tie counts one half, the accuracy of chance."""
    return float((margin > 0).double().mean() + (margin == 0).double().mean() / 2)
