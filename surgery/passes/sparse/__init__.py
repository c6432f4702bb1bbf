"""Weights with zeros: how a weight is laid out for it, which values stay, and what of the data tells that."""

from surgery.sparsity.layout import Layout
from surgery.sparsity.masks import Pattern, choose, count

__all__ = ["Layout", "Pattern", "choose", "count"]
