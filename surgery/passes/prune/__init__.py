"""Structured pruning: finds coupled tensor indices (units), selects units to remove, and updates the graph's sizes."""

from __future__ import annotations

from surgery.passes.prune.coupling import Axis, Coupling, Group

__all__ = ["Axis", "Coupling", "Group"]
