"""Names that come from files: what is accepted, checked where a name enters.

torch.fx writes attribute names into the Python code that it generates, and escapes nothing. So a name in a saved
directory, a checkpoint or a recipe must not be code: its components are identifiers or numbers, or these joined by
hyphens.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from surgery.common.errors import SurgeryError

# The label of an application of a pass, as the command line takes it (--as).
LABEL = re.compile(r"[A-Za-z0-9_-]*")
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_LONGEST = 512  # characters of a whole name; the deepest modules of transformers stay below 200


def is_plain(name: str, known: Collection[str] = ()) -> bool:
    """True if a dotted name is safe to write into code: short, and made of identifiers, numbers and hyphens.

    Args:
        name: Dotted name, such as "encoder.layer.0.query.lora.A".
        known: Components that are accepted as they are, such as those of a module that is loaded already.
    """
    if not 0 < len(name) <= _LONGEST:
        return False
    return all(part in known or _COMPONENT.fullmatch(part) for part in name.split("."))


def check_plain(name: object, what: str, failure: type[SurgeryError], known: Collection[str] = ()) -> str:
    """The name, if it is plain.

    Args:
        name: The name, of any type.
        what: What it names and where it stands, for the message: "a tensor of adapted/inserted.safetensors".
        failure: Error to raise.
        known: As in `is_plain`.

    Raises:
        SurgeryError: `failure`, if the name is no text, too long, or has other characters.
    """
    if not isinstance(name, str) or not is_plain(name, known):
        shown = repr(name)
        shown = shown if len(shown) <= 60 else shown[:57] + "…"
        raise failure(
            f"{what} is named {shown}; names are made of letters, digits, _ and - between dots, up to {_LONGEST} "
            "characters; the file was not written by surgery"
        )
    return name


def components(names: Iterable[str]) -> frozenset[str]:
    """The components of dotted names."""
    return frozenset(part for name in names for part in name.split("."))
