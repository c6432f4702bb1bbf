"""Writes the IA³ vectors of a program in PEFT's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.common.errors import ExportError
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.graph.ops import CONV, LINEAR
from surgery.passes.algebra.scale import channels
from surgery.store.peft.places import adapts_module, site_of, targets


def write_ia3(
    program: Program, live: Sequence[Entry]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Configuration, tensors and places of all IA³ entries; `feedforward_modules` have their inputs scaled."""
    tensors: dict[str, Tensor] = {}
    inputs: list[str] = []
    layouts: set[str] = set()
    for entry in live:
        for record in entry.sites:
            site = site_of(program, entry, record)
            if f"{record.path}.ia3_l" in tensors:
                raise ExportError(
                    f"{entry.id} at {record.path}: PEFT has one IA³ for a layer, and there is a second; leave one out "
                    f"(--without), or save the program"
                )
            known = adapts_module(program.base.loaded.module, site.key.owner.removesuffix(".weight"))
            if site.kind not in (LINEAR, CONV) or not known or len(site.float_shape) == 3:
                raise ExportError(
                    f"{entry.id} at {record.path}: PEFT has IA³ for linear layers, Conv2d and Conv3d, and this is none "
                    f"of them; leave it out (--without), or save the program"
                )
            axis = record.decided["axis"]
            own = {name: program.tensors[full].detach().flatten() for name, full in record.tensors.items()}
            scale = torch.ones(channels(site, axis), dtype=site.float_dtype)
            for part, features in (record.decided["rows"] or {"": slice(None)}).items():
                scale[features] = 1 + entry.weight * (own[f"scale_{part}" if part else "scale"] - 1)
            if axis == "i":
                inputs.append(record.path)
            if site.kind == CONV:
                shape = (1, -1, *(1 for _ in site.float_shape[2:]))
            else:
                layouts.add(site.layout)
                shape = (1, -1) if axis == "i" else (-1, 1)
            tensors[f"{record.path}.ia3_l"] = scale.view(shape)
    paths = {name.removesuffix(".ia3_l") for name in tensors}
    config = {
        "target_modules": targets(paths, program.base.loaded.module),
        "feedforward_modules": targets(inputs, program.base.loaded.module),
        # PEFT corrects it for each layer by its class.
        "fan_in_fan_out": layouts == {"io"},
        "init_ia3_weights": True,
    }
    return config, tensors, {path: f"{path}.base_layer" for path in paths}
