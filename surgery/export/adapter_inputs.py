"""LoRA weights as optional inputs of an ONNX model, with one `.onnx_adapter` file for each adapter.

All LoRAs of a program are replaced by a single LoRA of the largest rank, with scale 1. Its A and B are optional inputs
with zeros as defaults, so the model without an adapter computes the base. The file of an adapter holds values for these
inputs: the adapter's A and B, with its scale multiplied into B, padded with zeros to the largest rank.
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
from surgery.passes.lora.lora import Lora

if TYPE_CHECKING:
    from surgery.engine.program import Program

_LABEL = "slot"


@dataclass(frozen=True)
class Slots:
    """A program whose LoRAs were replaced by one LoRA of zeros.

    Attributes:
        program: the program with the LoRA of zeros.
        names: names of the tensors of that LoRA.
        adapters: values of these tensors by adapter name.
        alone: the original program with only one adapter, by adapter name, for comparison.
    """

    program: Program
    names: tuple[str, ...]
    adapters: Mapping[str, Mapping[str, Tensor]]
    alone: Mapping[str, Program]


def slots(program: Program) -> Slots:
    """Replace all LoRAs of a program with one LoRA of zeros.

    Raises:
        ExportError: the program has no active LoRA.
        PassError: a LoRA is not a plain low-rank update (for example with DoRA).
    """
    chosen = [
        (entry, entry.weight)
        for entry in live_entries(program.journal)
        if type(pass_of(entry, program.base.plugins)) is Lora
    ]
    if not chosen:
        disabled = [e.id for e in program.journal if e.kind == "rewrite" and e.weight == 0]
        remedy = (
            f"enable a disabled adapter (--weight {disabled[0]}=1)"
            if disabled
            else "apply one, or remove the option"
        )
        raise ExportError(f"--adapters-as-inputs: the program has no active, unmerged LoRA; {remedy}")
    labels = {entry.id: entry.label or entry.id for entry, _ in chosen}
    places = places_of(program, chosen, "--adapters-as-inputs")
    pairs = [
        {
            source.entry: combine.plain_pairs(place.site, source, "--adapters-as-inputs")
            for source in place.sources
        }
        for _, place in places
    ]
    # One shared LoRA has to hold every adapter, so it takes the largest rank at any site.
    rank = max(a.shape[1] for own in pairs for by_pair in own.values() for a, _ in by_pair.values())
    carrier = combine.carrier(Lora, [place for _, place in places], rank, _LABEL)
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
            # The shared LoRA has scale 1, so the scale and the weight of the adapter go into B.
            scale = source.weight * source.pass_.scale  # type: ignore[attr-defined]
            scaled = {pair: (a, b * scale) for pair, (a, b) in own[source.entry].items()}
            for name, value in combine.named(scaled, rank).items():
                slot = slotted.tensors[record.tensors[name]]
                adapters[labels[source.entry]][record.tensors[name]] = value.reshape(slot.shape).to(slot)
    # Each adapter is compared with the original program without the other adapters.
    alone = {
        label: program.without(*(other for other in labels if other != own)) for own, label in labels.items()
    }
    return Slots(slotted, tuple(names), adapters, alone)


def write_adapters(
    adapters: Mapping[str, Mapping[str, Tensor]], stored: Mapping[str, str], folder: Path
) -> None:
    """Write `NAME.onnx_adapter` for each adapter.

    Args:
        adapters: tensors of each adapter, by adapter name and tensor name.
        stored: name of each tensor in the ONNX model.
        folder: the directory to write to.

    Raises:
        ExportError: a file cannot be written.
    """
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
