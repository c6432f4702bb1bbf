"""Removing units physically: which indices of which tensors belong together, which go, and the sizes behind them."""

from __future__ import annotations

from surgery.passes.prune.coupling import Axis, Coupling, Group

__all__ = ["Axis", "Coupling", "Group"]
