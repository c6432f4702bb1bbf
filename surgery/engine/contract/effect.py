"""Effects: properties of a pass that the engine needs to order, freeze, merge and undo passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Effect:
    """Effect of a pass with its options on a program.

    Most passes use one of ADAPTER, WEIGHT, STRUCTURE and SWAP; `dataclasses.replace` changes a single field.

    Attributes:
        freezes_base: The base stops training when the pass is applied, unless a selection decides what trains.
        attaches: The pass attaches to layers, so it is applied after passes that create layers (`comes_first`).
        adds_weights: The added tensors are weights of ops like the base's own, and later passes can target them.
        replaces_weight: The op at a site no longer reads the base's weight, so nothing can be merged into it there.
        independent: What the pass adds is not part of what other adapters at the site act on (a prefix beside the
            attention, an additional head), so that these are merged even where this pass is not. Leave it False for
            a branch that is added to the output of an op, as LoRA's: a later adapter scales that branch too.
        comes_first: The pass creates layers that adapters attach to; adapters are applied after it.
        reads_weight: The added branch computes with the weight of its op (with its norms, for example).
        scalable: The application can be scaled by a weight other than 0 and 1 (`Program.weighted`).
        partial: The pass can act on single parts of a fused projection.
        one_layer: The change stays within one layer, so that a live module can hold it.
        mixes_positions: The branch at a linear op reads other positions of the sequence. A decoder with a cache of
            keys and values computes only the new positions, so a live module refuses the pass.
        makes_zeros: The pass sets values of weights to zero, which later merges must preserve.
        rounding: Ops added by the pass that quantize their first argument, an activation.
    """

    freezes_base: bool = False
    attaches: bool = False
    adds_weights: bool = False
    replaces_weight: bool = False
    independent: bool = False
    comes_first: bool = False
    reads_weight: bool = False
    scalable: bool = False
    partial: bool = False
    one_layer: bool = True
    mixes_positions: bool = False
    makes_zeros: bool = False
    rounding: tuple[Any, ...] = ()


# A trained branch beside frozen layers: LoRA, adapters, prompts.
ADAPTER = Effect(freezes_base=True, attaches=True)
# New values for existing weights: masks, rounding, copies.
WEIGHT = Effect()
# New layers (pruned, copied or added), which adapters then attach to.
STRUCTURE = Effect(adds_weights=True, comes_first=True, one_layer=False)
# Another op or tensor instead of the base's weight: quantized codes, factors, fused ops.
SWAP = Effect(replaces_weight=True)
