"""Checks of names before a model is loaded, which takes long: roles in targets, adapters of a saved directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from surgery.common.errors import JournalError, SurgeryError
from surgery.common.plugins import CORE, Plugins
from surgery.common.readers import read_json
from surgery.engine.contract.base import Pass
from surgery.engine.journal import Journal
from surgery.engine.registry import find_pass
from surgery.graph.targets import check_roles
from surgery.store.saved import MANIFEST, is_saved


def check_targets(passes: Iterable[Pass], reference: str, plugins: Plugins) -> None:
    """Check the roles in the targets of passes.

    Only where roles are those of surgery: a pass of a plugin can assign others, now or in a saved directory.

    Raises:
        TargetError: a target names no role.
    """
    if Path(reference).is_dir():
        return
    for pass_ in passes:
        if find_pass(plugins, pass_.name).distribution != CORE:
            return
        if isinstance(pass_.target, str):
            check_roles(pass_.target)


def check_adapters(reference: str, names: Iterable[str]) -> None:
    """Check that a saved directory has adapters of these names. Any other reference, or a damaged one, is left alone.

    Raises:
        JournalError: the journal has no such adapter.
    """
    path, wanted = Path(reference), list(names)
    if not wanted or not is_saved(path):
        return
    try:
        journal = Journal.from_json(read_json(path / MANIFEST, JournalError)["journal"])
    except (SurgeryError, KeyError, TypeError):
        return  # loading it says what is wrong
    for name in wanted:
        journal.find(name)
