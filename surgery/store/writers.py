"""Formats of saved directories, registered for `Program.save` and `Program.write`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.common.hooks import hookimpl
from surgery.store.diffusers import write_diffusers
from surgery.store.hf import write_hf
from surgery.store.peft.writing import export_peft
from surgery.store.saved import save


@hookimpl
def surgery_writers() -> dict[str, Callable[..., Any]]:
    """Name of a format -> function (program, path, **options) that writes it."""
    return {"surgery": save, "hf": write_hf, "diffusers": write_diffusers, "peft": export_peft}
