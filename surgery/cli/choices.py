"""Values of options that are defined in modules which import torch, repeated here so that `--help` need not.

tests/cli/test_startup.py compares each with its definition.
"""

from __future__ import annotations

# surgery.engine.contract.combination.METHODS
COMBINE_METHODS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
# surgery.engine.contract.combination.Majority
MAJORITIES = ("total", "frequency")
# surgery.engine.contract.folds.How
QUANTIZED_MERGES = ("keep", "requantize", "residual", "auto")
# surgery.train.request.HELD_OUT
HELD_OUT = "0.1"
