"""LoRA as optional inputs of an ONNX model, and onnxruntime's `.onnx_adapter` files: one model, several adapters.

All LoRAs of a program become one of the largest rank, of scale 1 and zeros, whose A and B are inputs with these zeros
as their defaults: with no adapter the model is its base. Each adapter's file holds its own A and B by those names, with
its scale multiplied into B, filled with zeros up to that rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.common.errors import ExportError
from surgery.engine.change.combine import carried, places_of
from surgery.engine.replay import live_entries, pass_of
from surgery.export.optional import require
from surgery.export.runtime import adapter_file
from surgery.passes.lora import combine
from surgery.passes.lora.lora import Lora, plain_pairs

if TYPE_CHECKING:
    from surgery.engine.program import Program

_LABEL = "slot"


@dataclass(frozen=True)
class Slots:
    """program: with one LoRA of zeros in the place of all. names: of its tensors. adapters: by name, the tensors that
    each puts there. alone: by name, the program with that adapter only, to compare with."""

    program: Program
    names: tuple[str, ...]
    adapters: Mapping[str, Mapping[str, Tensor]]
    alone: Mapping[str, Program]


def slots(program: Program) -> Slots:
    """Raises ExportError where there is no LoRA, PassError for one that is no plain low-rank update."""
    chosen = [
        (entry, entry.weight)
        for entry in live_entries(program.journal)
        if type(pass_of(entry, program.base.plugins)) is Lora
    ]
    if not chosen:
        out = [e.id for e in program.journal if e.kind == "rewrite" and e.weight == 0]
        remedy = (
            f"let in what is left out (--weight {out[0]}=1)" if out else "apply one, or leave the option out"
        )
        raise ExportError(
            f"--adapters-as-inputs: the program carries no LoRA that is in and not folded; {remedy}"
        )
    labels = {entry.id: entry.label or entry.id for entry, _ in chosen}
    places = places_of(program, chosen, "--adapters-as-inputs")
    pairs = [
        {source.entry: plain_pairs(place.site, source, "--adapters-as-inputs") for source in place.sources}
        for _, place in places
    ]
    rank = max(a.shape[1] for own in pairs for by_end in own.values() for a, _ in by_end.values())
    carrier = Lora.carrier([place for _, place in places], rank, _LABEL)
    zeros = [
        {
            name: torch.zeros(spec.shape)
            for name, spec in carrier.tensors(place.site).items()
            if spec.trainable
        }
        for _, place in places
    ]
    slotted = carried(program, chosen, carrier, places, zeros)
    records = next(e for e in slotted.journal if e.id == carrier.entry_id).sites
    adapters: dict[str, dict[str, Tensor]] = {label: {} for label in labels.values()}
    names: list[str] = []
    for record, (_, place), own, held in zip(records, places, pairs, zeros, strict=True):
        names += [record.tensors[name] for name in held]
        for source in place.sources:
            scale = source.weight * source.pass_.scale  # type: ignore[attr-defined]
            scaled = {end: (a, b * scale) for end, (a, b) in own[source.entry].items()}
            for name, value in combine.named(scaled, rank).items():
                slot = slotted.tensors[record.tensors[name]]
                adapters[labels[source.entry]][record.tensors[name]] = value.reshape(slot.shape).to(slot)
    alone = {
        label: program.without(*(other for other in labels if other != own)) for own, label in labels.items()
    }
    return Slots(slotted, tuple(names), adapters, alone)


def write_adapters(
    adapters: Mapping[str, Mapping[str, Tensor]], stored: Mapping[str, str], folder: Path
) -> None:
    """`NAME.onnx_adapter` for each. stored: the names of the tensors in the model."""
    ort = require("onnxruntime")
    for name, tensors in adapters.items():
        values = {
            stored[own]: ort.OrtValue.ortvalue_from_numpy(tensor.detach().cpu().contiguous().numpy())
            for own, tensor in tensors.items()
        }
        written = ort.AdapterFormat()
        written.set_adapter_version(1)
        written.set_model_version(1)
        written.set_parameters(values)
        file = adapter_file(folder, name)
        try:
            written.export_adapter(str(file.absolute()))
        except Exception as error:
            raise ExportError(f"{file} cannot be written: {error}") from error
