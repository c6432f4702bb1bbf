"""Mutations of a protobuf message: any field of any depth, and any byte."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

from tests.security.mutations import TEXTS

_NUMBERS = (0, 1, -1, 2, 7, 99, 2**31 - 1, 2**40, 2**62, -(2**63))
# Fields that decide what is read from where, and how much of it.
_INTERESTING = {
    "external_data", "dims", "location", "value", "key", "data_type", "raw_data", "metadata_props", "data_location",
    "dim_value",
}  # fmt: skip


def fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every field that is set in a message and the messages in it, as (message, descriptor)."""
    for field, value in message.ListFields():
        yield message, field
        if field.message_type is not None:
            for inner in value if _is_list(value) else (value,):
                yield from fields(inner)


def mutated(message: Any, rng: random.Random) -> tuple[bytes, str]:
    """The bytes of a changed copy, and a description."""
    made, said = copy.deepcopy(message), []
    if rng.random() < 0.85:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            found = list(fields(made))
            if rng.random() < 0.3:
                found = [pair for pair in found if pair[1].name in _INTERESTING] or found
            if found:
                said.append(_change(*rng.choice(found), rng))
        return made.SerializeToString(), "; ".join(said)
    raw = bytearray(made.SerializeToString())
    for _ in range(rng.choice((1, 3, 10))):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    if rng.random() < 0.3:
        raw = raw[: rng.randrange(len(raw))]
    return bytes(raw), "bytes"


def _change(message: Any, field: Any, rng: random.Random) -> str:
    value = getattr(message, field.name)
    if field.message_type is not None:
        if not _is_list(value) or not len(value):
            message.ClearField(field.name)
        elif rng.random() < 0.5:
            del value[rng.randrange(len(value))]
        else:
            value.append(copy.deepcopy(rng.choice(value)))
        return f"{field.full_name} dropped or repeated"
    with contextlib.suppress(ValueError, TypeError):  # no number of the field's own type
        if _is_list(value):
            place = rng.randrange(len(value))
            value[place] = _other(value[place], rng)
        else:
            setattr(message, field.name, _other(value, rng))
    return f"{field.full_name} changed"


def _other(old: Any, rng: random.Random) -> Any:
    if isinstance(old, str):
        text = rng.choice(TEXTS) if rng.random() < 0.7 else old[: len(old) // 2]
        return text.encode("utf-8", "ignore").decode()
    if isinstance(old, bytes):
        return rng.choice((b"", old[: len(old) // 2], old + old, bytes(reversed(old))))
    if isinstance(old, int):
        return rng.choice(_NUMBERS)
    return rng.choice((0.0, 1e38, float("nan"), float("inf"), -1.0))


def _is_list(value: Any) -> bool:
    return (
        hasattr(value, "__len__") and not isinstance(value, (str, bytes)) and not hasattr(value, "ListFields")
    )
