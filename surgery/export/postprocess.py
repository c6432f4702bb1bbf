"""What is done to every translated graph: names kept, simplified without reading weights, provenance written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgery.export import annotate, metadata_keys
from surgery.export.lowerings.dequantize import Weight, lower
from surgery.export.optimise import optimise
from surgery.export.unfused_sums import keep_sums_apart


@dataclass(frozen=True)
class Finished:
    """stored: name of a program's tensor -> initializer that holds it. tied: name -> name that is kept. quantized: the
    weights that stand there in few bits."""

    stored: Mapping[str, str]
    tied: Mapping[str, str]
    quantized: tuple[Weight, ...]


def finish(
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    parameters: Iterable[str],
    names: Mapping[str, torch.Tensor],
    provenance: annotate.Provenance,
    journal_json: str | None,
    ends: Callable[[Any], None] | None = None,
    optional: Iterable[str] = (),
) -> Finished:
    """Finish an onnx_ir.Model that nothing has folded yet, in place.

    tensors: what the traced graph reads, by name. parameters: names of those whose values may not be looked at. names:
    every name that the program has for a tensor. ends: names inputs and outputs, after the nodes were tagged.
    optional: tensors that may be given from outside: inputs of the same name, of which they are the default.
    Raises ExportError where a tensor with provenance is lost.
    """
    annotate.tag_nodes(model)
    tied = annotate.tie_weights(model, tensors)
    pinned = {tied.get(name, name) for name, entry in provenance.items() if entry.get("pinned", True)}
    weights = {tied.get(name, name) for name in parameters}
    if ends is not None:
        ends(model)
    optimise(model, weights=weights | pinned, pinned=pinned)
    quantized = lower(model)
    keep_sums_apart(model)
    stored = annotate.stored_names(model, tensors, tied)
    annotate.write_provenance(model, provenance, stored)
    annotate.note_ties(model, {**names, **tensors}, stored)
    model.producer_name = "surgery"
    if journal_json is not None:
        model.metadata_props[metadata_keys.JOURNAL] = journal_json
    model.graph.inputs.extend(model.graph.initializers[stored[name]] for name in optional)
    return Finished(stored, tied, quantized)
