"""Dialogues of rows as tokens, by a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.common.errors import TrainingError
from surgery.train.data_context import Setting
from surgery.train.tokens import IGNORED

Message = dict[str, str]


def chat_template(objective: str, given: str | None, setting: Setting, instead: str = "") -> str:
    """The chat template of a file, or the tokenizer's. instead: what else a person can say where there is none.

    Raises TrainingError where there is none, or the program reads no tokens.
    """
    template = setting.need_tokenizer(objective).chat_template
    if given is not None:
        try:
            template = Path(given).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"--template {given} cannot be read: {error}") from None
    if not template:
        raise TrainingError(
            f"objective {objective!r}: the tokenizer has no chat template; give one with --template FILE{instead}"
        )
    return str(template)


def messages_of(value: Any, column: str) -> list[Message]:
    """The messages of a column that holds them. Raises TrainingError for anything else."""
    good = isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not good:
        raise TrainingError(f"column {column!r} holds no list of messages with a role and a content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def messages_in(value: Any, role: str, column: str) -> list[Message]:
    """The messages of a column of texts, each of which one of that role said, or of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return messages_of([value], column)
    if value is None:
        raise TrainingError(f"column {column!r} holds {value!r}, which is no text")
    return messages_of(value, column)


def chat_tokens(messages: Sequence[Message], setting: Setting, **how: bool) -> list[int]:
    """Tokens of messages by the template that was decided on."""
    read = setting.tokenizer
    template = setting.decided["template"]
    text = read.apply_chat_template(list(messages), chat_template=template, tokenize=False, **how)
    return list(read(text, add_special_tokens=False)["input_ids"])


def answered(
    messages: Sequence[Message], setting: Setting, objective: str, start: int = 0
) -> tuple[list[int], list[int]]:
    """Tokens of a dialogue, and the same tokens with IGNORED in the place of all that is in no answer.

    Answers are what the assistant says, from the message `start` on. What the template puts before one is no part of
    it; what ends it is. Raises TrainingError for a template under which answers cannot be told apart.
    """
    ids: list[int] = []
    labels: list[int] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < start:
            continue
        asked = chat_tokens(messages[:number], setting, add_generation_prompt=True)
        whole = chat_tokens(messages[: number + 1], setting)
        if asked[: len(ids)] != ids or whole[: len(asked)] != asked:
            raise TrainingError(
                f"objective {objective!r}: the chat template writes the start of a dialogue in another way once there "
                f"is more of it, so that answers cannot be told apart; give another with --template FILE"
            )
        labels += [IGNORED] * (len(asked) - len(ids)) + whole[len(asked) :]
        ids = whole
    return ids, labels
