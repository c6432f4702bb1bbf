"""The journal: what was decided, in the order it was done. Replaying it never draws or recomputes anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.common.errors import JournalError, nearest
from surgery.graph.sites import SiteKey


@dataclass(frozen=True)
class SiteRecord:
    """One rewritten site: its key, what was decided there, and tensor of the pass -> name in the program.

    What it has decided under "reads" are the names of tensors that it is made from.
    """

    key: SiteKey
    path: str
    decided: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def stands_on(self) -> set[str]:
        """Names without which it cannot be replayed."""
        return {self.key.owner, *self.decided.get("reads", {}).values()}


@dataclass(frozen=True)
class Entry:
    """One application of one pass.

    kind: "rewrite", "select" or "merge". auto: added by the pipeline, not by the user. trains: parameter name
    -> trains. rates, windows, unit, masks: see Selection; masks names the tensors that hold them. before: of
    what it makes train and had been trained before, the tensors that hold what it was. limits: new upper bounds of
    dynamic dimensions. weight: 1 as trained, 0 left out. numerics: declared and observed.
    """

    id: str
    pass_name: str
    kind: str
    distribution: str = "torch-surgery"
    distribution_version: str = ""
    version: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[SiteRecord, ...] = ()
    trains: Mapping[str, bool] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    unit: str = "step"
    masks: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    auto: bool = False

    @property
    def label(self) -> str:
        return self.id.partition(":")[2]

    @property
    def tensor_names(self) -> list[str]:
        own = (name for record in self.sites for name in record.tensors.values())
        return list(dict.fromkeys([*own, *self.masks.values(), *self.before.values()]))

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "pass": self.pass_name,
            "kind": self.kind,
            "distribution": self.distribution,
            "distribution_version": self.distribution_version,
            "version": self.version,
            "options": dict(self.options),
            "sites": [
                {
                    "key": r.key.to_json(),
                    "path": r.path,
                    "decided": dict(r.decided),
                    "tensors": dict(r.tensors),
                }
                for r in self.sites
            ],
            "trains": dict(self.trains),
            "rates": dict(self.rates),
            "windows": {name: list(window) for name, window in self.windows.items()},
            "unit": self.unit,
            "masks": dict(self.masks),
            "before": dict(self.before),
            "limits": dict(self.limits),
            "numerics": dict(self.numerics),
            "weight": self.weight,
            "auto": self.auto,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Entry:
        try:
            return Entry(
                id=str(data["id"]),
                pass_name=str(data["pass"]),
                kind=str(data["kind"]),
                distribution=str(data["distribution"]),
                distribution_version=str(data["distribution_version"]),
                version=int(data["version"]),
                options=dict(data["options"]),
                sites=tuple(
                    SiteRecord(SiteKey.from_json(r["key"]), r["path"], dict(r["decided"]), dict(r["tensors"]))
                    for r in data["sites"]
                ),
                trains={str(k): bool(v) for k, v in data["trains"].items()},
                # Absent in schema 1.
                rates={str(k): float(v) for k, v in data.get("rates", {}).items()},
                windows={
                    str(k): (int(a), None if b is None else int(b))
                    for k, (a, b) in data.get("windows", {}).items()
                },
                unit=str(data.get("unit", "step")),
                masks={str(k): str(v) for k, v in data.get("masks", {}).items()},
                before={str(k): str(v) for k, v in data.get("before", {}).items()},
                limits={str(k): int(v) for k, v in data.get("limits", {}).items()},
                numerics=dict(data["numerics"]),
                weight=float(data["weight"]),
                auto=bool(data["auto"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise JournalError(
                f"the journal has an entry that cannot be read ({error!r}); save it again"
            ) from None


@dataclass(frozen=True)
class Journal:
    """An immutable sequence of entries."""

    entries: tuple[Entry, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, *entries: Entry) -> Journal:
        return Journal(self.entries + entries)

    def find(self, name: str) -> list[Entry]:
        """Entries by id ("lora:film"), label ("film") or pass name ("lora": all of them).

        Raises JournalError with the nearest names where there is none.
        """
        exact = [e for e in self.entries if e.id == name]
        found = exact or [e for e in self.entries if e.label == name] or self.by_pass(name)
        if not found:
            known = [e.id for e in self.entries] + [e.label for e in self.entries if e.label]
            there = f"it has {', '.join(repr(e.id) for e in self.entries)}" if known else "it is empty"
            raise JournalError(f"no pass {name!r} in the journal{nearest(name, known) or '; ' + there}")
        return found

    def by_pass(self, name: str) -> list[Entry]:
        return [e for e in self.entries if e.pass_name == name]

    def weighted(self, weights: Mapping[str, float]) -> Journal:
        """The same decisions with other adapter weights."""
        chosen: dict[str, float] = {}
        for name, weight in weights.items():
            for entry in self.find(name):
                if entry.kind != "rewrite":
                    raise JournalError(
                        f"{entry.id!r} is no adapter: only what inserts a branch can be weighted"
                    )
                if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                    raise JournalError(f"the weight of {entry.id!r} is {weight!r}, which is no number")
                if not math.isfinite(weight):
                    raise JournalError(f"the weight of {entry.id!r} is {weight}; give a finite number")
                chosen[entry.id] = float(weight)
        return Journal(tuple(replace(e, weight=chosen[e.id]) if e.id in chosen else e for e in self.entries))

    def decided(self, names: tuple[str, ...]) -> bool | None:
        """Whether a parameter, by any of its names, trains: the last entry that says so decides, None where none
        does. What is left out says nothing."""
        for entry in reversed(self.entries):
            if entry.weight == 0:
                continue
            for name in names:
                if name in entry.trains:
                    return entry.trains[name]
        return None

    def trains(self, names: tuple[str, ...], default: bool = True) -> bool:
        """Whether a parameter, by any of its names, trains after all selections; `default` where none names it."""
        decided = self.decided(names)
        return default if decided is None else decided

    def standing(self, entry: Entry) -> Entry:
        """The entry as merges have left it: with other tensors, and without the sites where it is in the codes now."""
        for merge in self.entries:
            if merge.kind != "merge":
                continue
            plain = entry.id in merge.options.get("simplified", ())
            made = {r.key: r for r in merge.sites if r.decided["entry"] == entry.id}
            sites = []
            for own in entry.sites:
                found = made.get(own.key)
                if found is None:
                    sites.append(own)
                elif not found.decided.get("gone"):
                    said = {name: value for name, value in found.decided.items() if name != "entry"}
                    decided = {**own.decided, **said, **({"simplified": True} if plain else {})}
                    sites.append(replace(own, decided=decided, tensors=found.tensors))
            if made:
                entry = replace(entry, sites=tuple(sites))
        return entry

    @property
    def merged(self) -> bool:
        return any(e.kind == "merge" for e in self.entries)

    def to_json(self) -> list[dict[str, Any]]:
        return [e.to_json() for e in self.entries]

    @staticmethod
    def from_json(data: Any) -> Journal:
        if not isinstance(data, list):
            raise JournalError("the journal is not a list of entries; the file is not one that surgery wrote")
        return Journal(tuple(Entry.from_json(item) for item in data))
