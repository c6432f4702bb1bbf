"""Prefixes: keys and values that an attention sees before its own.

    (B, h, S, D) ──repeated──▶ (B, H, S, D)  ──▶ cat with (B, H, P, D) along S ──▶ the attention's core
    mask (…, Q, S) ──────────────────────────────▶ P visible columns before it

A prefix has the heads h that the model computes, not those that grouped queries repeat them to; it is repeated as
the keys are.

operands   keys and values at the op that reads them
scores     masks and biases in eager attention
places     every attention, with the above
insert     cat, masks
gate       a prefix with a softmax of its own
positions  where positions enter, to count from the prefix on
start      keys and values of real tokens to start at
"""

from __future__ import annotations

from surgery.passes.prefix.insert import attend, root_stack
from surgery.passes.prefix.operands import Unsuited
from surgery.passes.prefix.places import Place, attentions_by_site, read_place

__all__ = ["Place", "Unsuited", "attend", "attentions_by_site", "read_place", "root_stack"]
