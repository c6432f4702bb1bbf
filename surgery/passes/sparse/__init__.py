"""Weights with zeros: how a weight is laid out for it, which values stay, and what of the data tells that."""

from surgery.passes.sparse.axes import Layout
from surgery.passes.sparse.masks import Pattern, choose, count

__all__ = ["Layout", "Pattern", "choose", "count"]
