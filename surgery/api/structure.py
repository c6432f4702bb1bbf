"""Blocks, branches and attentions of a model, and functions to read a graph, for passes that insert parts."""

from __future__ import annotations

from surgery.graph.analysis.attention import Attention
from surgery.graph.analysis.blocks import Block
from surgery.graph.analysis.branches import Branch
from surgery.graph.marks import input_before_adapters, output_with_adapters
from surgery.graph.ops import arguments
from surgery.graph.rewrite.current import adapted_by, replaced_op
from surgery.graph.rewrite.refusals import computed_weight, not_floating, scaled_op
from surgery.graph.sites import SiteKey
from surgery.graph.targets import select_sites

__all__ = [
    "Attention",
    "Block",
    "Branch",
    "SiteKey",
    "adapted_by",
    "arguments",
    "computed_weight",
    "input_before_adapters",
    "not_floating",
    "output_with_adapters",
    "replaced_op",
    "scaled_op",
    "select_sites",
]
