"""Low-rank branches, scaling vectors, measures of weights, and combinations of several adapters."""

from __future__ import annotations

from surgery.engine.contract.base import Place, Source
from surgery.engine.contract.combination import Combination
from surgery.graph.rewrite.refusals import computed_weight
from surgery.passes.algebra.low_rank import (
    AddLowRank,
    add_branch,
    add_rows,
    branch,
    factor_shapes,
    gather_index,
)
from surgery.passes.algebra.scale import (
    ScaleAxis,
    channels,
    ones_elsewhere,
    part_index,
    scale_input,
    scale_output,
)
from surgery.passes.measure.fisher import fisher

__all__ = [
    "AddLowRank",
    "Combination",
    "Place",
    "ScaleAxis",
    "Source",
    "add_branch",
    "add_rows",
    "branch",
    "channels",
    "computed_weight",
    "factor_shapes",
    "fisher",
    "gather_index",
    "ones_elsewhere",
    "part_index",
    "scale_input",
    "scale_output",
]
