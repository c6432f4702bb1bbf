"""Postprocessing of every translated graph: names, simplification, lowering of quantized weights and provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgery.export import annotate, metadata_keys
from surgery.export.lowerings.dequantize import Weight, lower
from surgery.export.optimise import optimise
from surgery.export.saturation import check_products
from surgery.export.sliced_tables import state_lengths
from surgery.export.unfused_sums import keep_sums_apart


@dataclass(frozen=True)
class Finished:
    """Result of postprocessing a graph.

    Attributes:
        stored: name of the initializer that stores each tensor of the program, by tensor name.
        tied: dropped names of tied tensors, with the name that was kept.
        quantized: the quantized weights of the graph.
    """

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
    cpu: str = "any",
) -> Finished:
    """Postprocess an unoptimized onnx_ir.Model in place.

    Args:
        model: the onnx_ir model.
        tensors: tensors that the traced graph reads, by name.
        parameters: names of the tensors whose values the simplification must not read.
        names: tensors by every name in the program.
        provenance: {"pass", "name", "site"} by tensor name.
        journal_json: the program's journal as JSON; None writes no journal.
        ends: function that renames the inputs and outputs of the model; None leaves them as they are.
        optional: names of tensors that become optional inputs, with their values as defaults.
        cpu: "vnni" allows integer products that saturate on processors without VNNI.

    Raises:
        ExportError: a tensor with provenance is missing from the result, or a product can overflow and `cpu` is "any".
    """
    # Tag the nodes first: later steps drop the reference to the traced node, and `ends` renames outputs that tagging
    # compares with traced names. Lower quantized weights after the simplification, which would fold them to floats.
    annotate.tag_nodes(model)
    tied = annotate.tie_weights(model, tensors)
    pinned = {tied.get(name, name) for name, entry in provenance.items() if entry.get("pinned", True)}
    weights = {tied.get(name, name) for name in parameters}
    if ends is not None:
        ends(model)
    optimise(model, weights=weights | pinned, pinned=pinned)
    quantized = lower(model)
    keep_sums_apart(model)
    state_lengths(model)
    stored = annotate.stored_names(model, tensors, tied)
    annotate.write_provenance(model, provenance, stored)
    check_products(model, cpu)
    annotate.note_ties(model, {**names, **tensors}, stored)
    # The tools of onnxruntime ask who made a file, to know its patterns, and these are those of torch.onnx.
    model.producer_name = "pytorch"
    if journal_json is not None:
        model.metadata_props[metadata_keys.JOURNAL] = journal_json
    # In ONNX an initializer that is also an input is the default value of an optional input.
    model.graph.inputs.extend(model.graph.initializers[stored[name]] for name in optional)
    return Finished(stored, tied, quantized)
