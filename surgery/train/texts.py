"""What rows hold as what a model reads: texts as tokens, and images."""

from __future__ import annotations

from typing import Any

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting
from surgery.train.images import IMAGE

TEXT = ("text", "sentence", "content", "review", "document", "article", "body")
TEXT_OR_IMAGE = (*TEXT, *IMAGE)


def read(row: Row, setting: Setting, option: str = "text") -> dict[str, Any]:
    """What an example holds of a row for `Setting.pad`: the tokens of its text, or its image, as the model reads."""
    if setting.images is None:
        return tokens(row, setting, option)
    column = setting.columns[option]
    return {"pixels": setting.images.read(row[column], column)}


def text_of(row: Row, setting: Setting, option: str = "text") -> str:
    """The text of a row. Raises TrainingError for one that is none."""
    column = setting.columns[option]
    if not isinstance(row[column], str):
        raise TrainingError(f"column {column!r} holds {row[column]!r}, which is no text")
    return row[column]


def tokens(row: Row, setting: Setting, option: str = "text") -> dict[str, Any]:
    """The model's inputs for the text of a row, cut to the longest that it may be."""
    made = setting.tokenizer(text_of(row, setting, option), truncation=False)
    if len(made["input_ids"]) > setting.longest:
        setting.count(f"is longer than {setting.longest} tokens and was cut")
        made = setting.tokenizer(text_of(row, setting, option), truncation=True, max_length=setting.longest)
    return {name: made[name] for name in ("input_ids", "token_type_ids") if name in made}
