"""Prefixes: keys and values that are inserted before those of an attention.

    (B, h, S, D) ──repeated──▶ (B, H, S, D)  ──▶ cat with (B, H, P, D) along S ──▶ the attention's core
    mask (…, Q, S) ──────────────────────────────▶ P visible columns before it

A prefix has the h heads that the model computes, before grouped queries repeat them to H; it is repeated as the
keys are.

operands   keys and values as the attention op reads them
scores     masks and biases in eager attention
places     all attentions, with their operands and masks
insert     insertion of the prefix, and of mask columns
gate       a prefix with its own softmax
positions  sources of positions, so that real tokens are counted after the prefix
start      initialization from keys and values of real tokens
"""

from __future__ import annotations

from surgery.passes.prefix.insert import attend, root_stack
from surgery.passes.prefix.operands import Unsuited
from surgery.passes.prefix.places import Place, attentions_by_site, read_place

__all__ = ["Place", "Unsuited", "attend", "attentions_by_site", "read_place", "root_stack"]
