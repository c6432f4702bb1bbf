"""Sparsity: the axes of weights, patterns and masks of zeros, and measurements of inputs."""

from surgery.passes.sparse.axes import Layout
from surgery.passes.sparse.masks import Pattern, choose, count

__all__ = ["Layout", "Pattern", "choose", "count"]
