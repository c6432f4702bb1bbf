"""Built-in passes, registered through the same hook as everybody's."""

from __future__ import annotations

from surgery.hookspecs import hookimpl
from surgery.passes.freeze import Freeze
from surgery.passes.lora import Lora


@hookimpl
def surgery_passes() -> list[type]:
    return [Lora, Freeze]


__all__ = ["Freeze", "Lora", "surgery_passes"]
