"""Families of passes, for lists: derived from the class and its effect, so passes of plugins have one, too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgery.engine.change.selection import SelectPass
from surgery.engine.contract.base import Pass, RewritePass, with_defaults
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.registry import PassInfo

FAMILIES = (
    "adds trained tensors",
    "selects what trains",
    "changes the form of weights",
    "makes the model smaller",
    "replaces ops",
)


def family(cls: type[Pass]) -> str:
    """The family of a pass, one of FAMILIES."""
    adds, selects, changes, shrinks, replaces = FAMILIES
    if issubclass(cls, SelectPass):
        return selects
    if issubclass(cls, PatternPass):
        return replaces
    if not issubclass(cls, RewritePass):
        return changes
    effect = with_defaults(cls).effect
    if effect.freezes_base:
        return adds
    return shrinks if effect.comes_first else changes


def by_family(found: Iterable[PassInfo]) -> dict[str, list[PassInfo]]:
    """Family -> its passes by name; families without a pass are left out."""
    grouped: dict[str, list[Any]] = {title: [] for title in FAMILIES}
    for info in sorted(found, key=lambda i: i.name):
        grouped[family(info.cls)].append(info)
    return {title: infos for title, infos in grouped.items() if infos}
