"""Mutations of JSON-like values, and the one rule for the outcome: a SurgeryError, or something that works."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from surgery.common.errors import SurgeryError

# Names that would leave a string literal and touch a file when torch.fx compiles them; the test sets MARKER.
MARKER = "MARKER"
CODE = (
    f"training\"), open('{MARKER}', 'w'), getattr(self, \"training",  # every module has the attribute, so this runs
    f'x"); __import__("os").system("touch {MARKER}"); ("',
    f"x')\n    open('{MARKER}', 'w')\n    ('",
    f"{{open('{MARKER}','w')}}",
    f"!!python/object/apply:os.system ['touch {MARKER}']",
)
TEXTS = (
    *CODE, "", " ", "a", "a" * 600, "a" * 20_000, "a.b.c", ".", "..", "a..b", "../../../etc/passwd", "/etc/passwd",
    "C:\\x", "file:///etc/passwd", "\x00", "\n", "\x1b[31m", "é", "𝕏", "\ud800", "__class__", "__init__", "__dict__",
    "forward", "training", "_parameters", "_modules", "state_dict", "weight", "self", "None", "nan", "1e400", "-1",
    "1" * 5000, "py:os:system", "hf:nowhere", "x.pt2", "(a+)+$", "[", "**", "path:a,b", "!", "lora", "freeze", "merge",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 2**15, 10**6, 2**31 - 1, 2**31, 10**9, 2**53, 2**63 - 1, 2**63, 10**30, -(10**9), 0.0, -0.0,
    0.5, 1.5, 1e-45, 1e300, -1e300, math.inf, -math.inf, math.nan,
)  # fmt: skip


def others(rng: random.Random) -> Any:
    """A value of another type."""
    deep: Any = 1
    for _ in range(rng.choice((3, 50, 400))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice(
        (None, True, False, [], {}, [[]], [None], {"": None}, ["a", 1], {"a": 1}, list(range(50)), deep)
    )


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below a JSON value, keys and list items alike."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*at, index))


def get(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def mutate(document: Any, rng: random.Random, where: list[tuple[Any, ...]] | None = None) -> tuple[Any, str]:
    """A copy with one to three changed values or keys, and a description.

    Args:
        document: a JSON value.
        rng: source of randomness.
        where: paths that may change; all by default.
    """
    made, said = copy.deepcopy(document), []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        known = [at for at in (where or list(places(made))) if _there(made, at)]
        if not known:
            break
        at = rng.choice(known)
        parent, key = get(made, at[:-1]), at[-1]
        old, draw = parent[key], rng.random()
        if draw < 0.08:
            del parent[key]
            said.append(f"{at} removed")
        elif draw < 0.16 and isinstance(parent, dict):
            name = rng.choice((*TEXTS, str(key) + "x"))
            made_up = {(name if k == key else k): v for k, v in parent.items()}
            parent.clear()
            parent.update(made_up)
            said.append(f"{at} renamed to {name[:60]!r}")
        elif draw < 0.2 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(old))
            said.append(f"{at} repeated")
        elif draw < 0.26:
            parent[key] = copy.deepcopy(get(made, rng.choice(known)[:-1])) if rng.random() < 0.2 else (
                copy.deepcopy(get(document, rng.choice(list(places(document)))))
            )  # fmt: skip
            said.append(f"{at} = a value from elsewhere")
        else:
            parent[key] = _other(old, rng)
            said.append(f"{at} = {str(parent[key])[:80]!r} (was {str(old)[:40]!r})")
    return made, "; ".join(said)


def _there(value: Any, at: tuple[Any, ...]) -> bool:
    try:
        get(value, at)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _other(old: Any, rng: random.Random) -> Any:
    if rng.random() < 0.2:
        return others(rng)
    if isinstance(old, str):
        draw = rng.random()
        if draw < 0.1:
            return rng.choice(NUMBERS)
        if draw < 0.35 and old:
            cut = rng.randrange(len(old) + 1)
            return old[:cut] + rng.choice(TEXTS)[:200] + old[cut:]
        if draw < 0.45 and old:
            return old[: rng.randrange(len(old))]
        return rng.choice(TEXTS)
    if isinstance(old, bool) or old is None:
        return rng.choice((True, False, None, 0, 1, "true", rng.choice(NUMBERS), rng.choice(TEXTS)))
    if isinstance(old, (int, float)):
        return rng.choice((*NUMBERS, old + 1, old - 1, -old, float(old), str(old), rng.choice(TEXTS)))
    return others(rng)


def refused_or(call: Callable[[], Any], said: str) -> Any:
    """The result of a call, or the SurgeryError that it raised.

    Raises:
        AssertionError: It raised anything else, or an error that is no short line.
    """
    try:
        return call()
    except SurgeryError as error:
        text = str(error)
        assert 0 < len(text) < 4000, f"{said}: an error of {len(text)} characters"
        return error
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {str(error)[:300]}") from error
