"""Stored entries of other versions of a pass: migrated by the pass, or refused with both versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery.common.errors import JournalError
from surgery.common.guard import reported
from surgery.common.plugins import Plugins
from surgery.engine.journal import Entry, Journal, SiteRecord
from surgery.engine.registry import PassInfo, find_pass


def migrated(
    journal: Journal, tensors: Mapping[str, Tensor], plugins: Plugins, where: str
) -> tuple[Journal, dict[str, Tensor], dict[str, str]]:
    """A journal whose entries have the versions of the installed passes.

    A pass that changes what it stores raises its `version` and defines `migrate(options, tensors, version)`, a class or
    static method. It is called once for each site of an older entry, with the tensors there by their names in the pass,
    and returns both in their new form.

    Args:
        journal: The stored journal.
        tensors: Stored tensors, by name.
        plugins: The plugin manager.
        where: The directory, for messages.

    Returns:
        The journal, the tensors by name, and for each name that is new, the stored name that it comes from.

    Raises:
        JournalError: An entry is newer than the installed pass, or older and the pass has no `migrate`.
        PluginError: `migrate` fails.
    """
    found, names = dict(tensors), dict[str, str]()
    entries = []
    for entry in journal:
        if entry.kind != "merge":
            info = find_pass(plugins, entry.pass_name, entry.distribution)
            if entry.version != info.cls.version:
                entry = _migrated(entry, info, found, names, where)
        entries.append(entry)
    return Journal(tuple(entries)), found, names


def _migrated(
    entry: Entry, info: PassInfo, tensors: dict[str, Tensor], names: dict[str, str], where: str
) -> Entry:
    cls, version = info.cls, entry.version
    by = _dist(entry.distribution, entry.distribution_version)
    stored = f"version {version} of the pass {entry.pass_name!r} ({by})"
    here = f"version {cls.version} ({_dist(info.distribution, info.version)})"
    if version > cls.version:
        raise JournalError(
            f"{where}: {entry.id} was stored by {stored}, and {here} is installed; upgrade {info.distribution}"
        )
    migrate = getattr(cls, "migrate", None)
    if migrate is None:
        wanted = f"=={entry.distribution_version}" if entry.distribution_version else ""
        raise JournalError(
            f"{where}: {entry.id} was stored by {stored}; {here} is installed and defines no migrate; install "
            f"{entry.distribution}{wanted}"
        )
    options: Any = None
    records = []
    # A tensor that several sites share is given to each of them, and stored under one new name.
    held = {full: tensors.pop(full) for full in {f for r in entry.sites for f in r.tensors.values()}}
    for record in entry.sites or (None,):
        own = {name: held[full] for name, full in record.tensors.items()} if record else {}
        path = record.path if record else ""
        with reported(cls, "pass", "migrate", path):
            made, values = migrate(dict(entry.options), dict(own), version)
            made, values = dict(made), dict(values)
        if options is not None and made != options:
            raise JournalError(f"{where}: migrate of {entry.pass_name!r} returns other options at {path}")
        options = made
        if not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in values.items()):
            raise JournalError(
                f"{where}: migrate of {entry.pass_name!r} returns something else than tensors by name"
            )
        if record is not None:
            records.append(_stored(record, own, values, names))
            for name, full in records[-1].tensors.items():
                known = tensors.setdefault(full, values[name])
                if known.dtype != values[name].dtype or not torch.equal(known, values[name]):
                    raise JournalError(
                        f"{where}: migrate of {entry.pass_name!r} returns another {name!r} at {path} than at an "
                        "earlier site that shares it"
                    )
    renamed = {old: new for new, old in names.items()}
    return replace(
        entry,
        version=cls.version,
        distribution=info.distribution,
        distribution_version=info.version,
        options=options,
        sites=tuple(records),
        windows={renamed.get(name, name): window for name, window in entry.windows.items()},
    )


def _renamed(full: str, origin: str, name: str) -> str:
    """The full name of a tensor for another name in the pass; a shared tensor has its shape after that name."""
    stem, dot, leaf = full.rpartition(".")
    if leaf.startswith(f"{origin}_"):
        return f"{stem}{dot}{name}{leaf.removeprefix(origin)}"
    return f"{full.removesuffix(origin)}{name}"


def _dist(name: str, version: str) -> str:
    return f"{name} {version}".strip()


def _stored(
    record: SiteRecord, held: Mapping[str, Tensor], values: Mapping[str, Tensor], names: dict[str, str]
) -> SiteRecord:
    """The record with the names of migrated tensors; `names` is updated.

    Args:
        record: The stored record.
        held: Its tensors, by their names in the pass.
        values: The migrated tensors, by their names in the pass.
        names: New name -> stored name that it comes from.
    """
    fulls = {}
    for name, value in values.items():
        # A tensor comes from the one that it is; a new one from the first of the site.
        origin = next(
            (n for n, t in held.items() if t is value), name if name in held else next(iter(held), None)
        )
        if origin is None:
            stem = record.key.owner.rpartition(".")[0]
            fulls[name] = f"{stem}.{name}".lstrip(".")
        else:
            old = record.tensors[origin]
            fulls[name] = record.tensors.get(name) or _renamed(old, origin, name)
            if fulls[name] != old:
                names[fulls[name]] = old
    return replace(record, tensors=fulls)
