"""Converts texts and images of rows to the stored form that `Setting.pad` turns into model inputs."""

from __future__ import annotations

from typing import Any

from surgery.common.errors import TrainingError
from surgery.train.data_context import Row, Setting
from surgery.train.images import IMAGE

TEXT = ("text", "sentence", "content", "review", "document", "article", "body")
TEXT_OR_IMAGE = (*TEXT, *IMAGE)


def read(row: Row, setting: Setting, option: str = "text") -> dict[str, Any]:
    """Convert a row to the tokens of its text, or to the pixels of its image.

    Args:
        row: row of the data.
        setting: data context.
        option: option that names the column.

    Raises:
        TrainingError: the value is not a text or an image.
    """
    if setting.images is None:
        return tokens(row, setting, option)
    column = setting.columns[option]
    return {"pixels": setting.images.read(row[column], column)}


def text_of(row: Row, setting: Setting, option: str = "text") -> str:
    """Return the text of a row.

    Args:
        row: row of the data.
        setting: data context.
        option: option that names the column.

    Raises:
        TrainingError: the value is not a text.
    """
    column = setting.columns[option]
    if not isinstance(row[column], str):
        raise TrainingError(f"column {column!r} contains {row[column]!r}, which is not a text; fix the data")
    return row[column]


def tokens(row: Row, setting: Setting, option: str = "text") -> dict[str, Any]:
    """Tokenize the text of a row, cut to the maximum length.

    Args:
        row: row of the data.
        setting: data context.
        option: option that names the column.
    """
    # Tokenize without truncation first, so that cut texts can be counted.
    text = setting.prompt + text_of(row, setting, option)
    made = setting.tokenizer(text, truncation=False)
    if len(made["input_ids"]) > setting.longest:
        setting.count(f"is longer than {setting.longest} tokens and was cut")
        made = setting.tokenizer(text, truncation=True, max_length=setting.longest)
    return {name: made[name] for name in ("input_ids", "token_type_ids") if name in made}
