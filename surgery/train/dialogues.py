"""Converts dialogues in rows to tokens with a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.common.errors import TrainingError
from surgery.train.data_context import Setting
from surgery.train.tokens import IGNORED

Message = dict[str, str]


def chat_template(objective: str, given: str | None, setting: Setting, instead: str = "") -> str:
    """Return the chat template of a file, or the tokenizer's.

    Args:
        objective: name of the objective, for errors.
        given: path of a template file, or None.
        setting: data context with the tokenizer.
        instead: alternative to suggest in the error if there is no template.

    Raises:
        TrainingError: there is no template, or the program reads no tokens.
    """
    template = setting.need_tokenizer(objective).chat_template
    if given is not None:
        try:
            template = Path(given).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"--template {given} cannot be read: {error}") from None
    if not template:
        raise TrainingError(
            f"objective {objective!r}: the tokenizer has no chat template; pass one with --template FILE{instead}"
        )
    return str(template)


def messages_of(value: Any, column: str) -> list[Message]:
    """Return the messages of a value that is a list of messages.

    Raises:
        TrainingError: the value is anything else.
    """
    good = isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not good:
        raise TrainingError(
            f"column {column!r} is not a list of messages with 'role' and 'content'; fix the data"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def messages_in(value: Any, role: str, column: str) -> list[Message]:
    """Return the messages of a value that is a text, one message or a list of messages.

    Args:
        value: the value of a row.
        role: role of the speaker if the value is a text.
        column: name of the column, for errors.

    Raises:
        TrainingError: the value is none of these.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return messages_of([value], column)
    if value is None:
        raise TrainingError(f"column {column!r} contains {value!r}, which is not a text; fix the data")
    return messages_of(value, column)


def chat_tokens(messages: Sequence[Message], setting: Setting, **how: bool) -> list[int]:
    """Convert messages to tokens with the template in `setting.decided`."""
    read = setting.tokenizer
    template = setting.decided["template"]
    text = read.apply_chat_template(list(messages), chat_template=template, tokenize=False, **how)
    return list(read(text, add_special_tokens=False)["input_ids"])


def answered(
    messages: Sequence[Message], setting: Setting, objective: str, start: int = 0
) -> tuple[list[int], list[int]]:
    """Convert a dialogue to tokens and labels.

    Answers are the assistant's messages. The text that the template inserts before an answer does not belong to it;
    the text that ends the answer does.

    Args:
        messages: the dialogue.
        setting: data context with tokenizer and template.
        objective: name of the objective, for the error.
        start: index of the first message that may be an answer.

    Returns:
        The tokens, and the same tokens with IGNORED outside of answers.

    Raises:
        TrainingError: the template rewrites the start of a dialogue, so answers cannot be located.
    """
    ids: list[int] = []
    labels: list[int] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < start:
            continue
        asked = chat_tokens(messages[:number], setting, add_generation_prompt=True)
        whole = chat_tokens(messages[: number + 1], setting)
        # Answers are located by tokenizing ever longer prefixes, so each prefix must start with the one
        # before it.
        if asked[: len(ids)] != ids or whole[: len(asked)] != asked:
            raise TrainingError(
                f"objective {objective!r}: the chat template changes the start of a dialogue when messages follow, so "
                f"answers cannot be located; pass another with --template FILE"
            )
        labels += [IGNORED] * (len(asked) - len(ids)) + whole[len(asked) :]
        ids = whole
    return ids, labels
