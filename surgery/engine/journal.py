"""The journal: the applied passes with their decisions, in order. A replay draws nothing at random or from data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.common.errors import JournalError, nearest
from surgery.engine.schema import check_entry
from surgery.graph.sites import SiteKey


@dataclass(frozen=True)
class SiteRecord:
    """One rewritten site.

    Attributes:
        key: Key of the site.
        path: Path of the site, for messages.
        decided: Decisions of the pass at the site, JSON-able. "reads" names the tensors that the rewrite reads besides
            the site's own weight.
        tensors: Name of a tensor in the pass -> its name in the program.
    """

    key: SiteKey
    path: str
    decided: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def stands_on(self) -> set[str]:
        """Names of the tensors that must exist for the record to be replayed."""
        return {self.key.owner, *self.decided.get("reads", {}).values()}


@dataclass(frozen=True)
class Entry:
    """One application of one pass.

    Attributes:
        id: Unique name in the journal, such as "lora" or "lora:film".
        pass_name: Name of the pass.
        kind: "rewrite", "select" or "merge".
        distribution: Python distribution that provides the pass.
        distribution_version: Its version.
        version: Version of the data that the pass stores.
        options: Options of the pass, JSON-able.
        sites: Rewritten sites.
        trains: Parameter name -> True if it trains from here on, False if it is frozen.
        rates: Parameter name -> learning rate relative to the optimizer's, see Selection.
        windows: Parameter name -> training window [first, last), see Selection.
        unit: Unit of the windows, "step" or "epoch".
        masks: Parameter name -> name of the tensor with its gradient mask, see Selection.
        before: Parameter name -> name of the tensor with its value before this entry made it trainable. Only for
            parameters that had been trained by then.
        limits: New upper bounds of dynamic dimensions, by dimension name.
        numerics: Declared and observed change of the outputs.
        weight: Scale of the application: 1 as trained, 0 left out.
        auto: True if the pipeline added the entry, not the user.
        call: Number of the `apply` that added the entry, counted from 1; 0 if an earlier version wrote the journal.
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
    call: int = 0

    @property
    def label(self) -> str:
        """User-defined label of the application, or ""."""
        return self.id.partition(":")[2]

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors that the entry added to the program, including masks and earlier values."""
        own = (name for record in self.sites for name in record.tensors.values())
        return list(dict.fromkeys([*own, *self.masks.values(), *self.before.values()]))

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON-able data."""
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
            "call": self.call,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Entry:
        """The entry of data that `to_json` returned, now or in an earlier version.

        Raises:
            JournalError: A field is missing or has the wrong type.
        """
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
                call=int(data.get("call", 0)),
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
        """The journal with entries appended."""
        return Journal(self.entries + entries)

    def find(self, name: str) -> list[Entry]:
        """Entries by id ("lora:film"), label ("film") or pass name ("lora": every application of it).

        Raises:
            JournalError: No entry has this name; the message lists the nearest ones.
        """
        exact = [e for e in self.entries if e.id == name]
        found = exact or [e for e in self.entries if e.label == name] or self.by_pass(name)
        if not found:
            known = [e.id for e in self.entries] + [e.label for e in self.entries if e.label]
            there = f"it has {', '.join(repr(e.id) for e in self.entries)}" if known else "it is empty"
            raise JournalError(f"no pass {name!r} in the journal{nearest(name, known) or '; ' + there}")
        return found

    def by_pass(self, name: str) -> list[Entry]:
        """All applications of a pass, by its name."""
        return [e for e in self.entries if e.pass_name == name]

    def weighted(self, weights: Mapping[str, float]) -> Journal:
        """The same entries with other adapter weights.

        Args:
            weights: Name of an adapter, as in `find`, -> its new weight.

        Raises:
            JournalError: An entry is not an adapter, or a weight is not a finite number.
        """
        chosen: dict[str, float] = {}
        for name, weight in weights.items():
            for entry in self.find(name):
                if entry.kind != "rewrite":
                    raise JournalError(
                        f"{entry.id!r} is not an adapter and has no weight to set; name an adapter"
                    )
                if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                    raise JournalError(f"the weight of {entry.id!r} is {weight!r}; give a number")
                if not math.isfinite(weight):
                    raise JournalError(f"the weight of {entry.id!r} is {weight}; give a finite number")
                chosen[entry.id] = float(weight)
        return Journal(tuple(replace(e, weight=chosen[e.id]) if e.id in chosen else e for e in self.entries))

    def decided(self, names: tuple[str, ...]) -> bool | None:
        """True or False as the last entry that names the parameter says; None if no entry names it.

        Entries of weight 0 do not count.

        Args:
            names: All names of the parameter.
        """
        for entry in reversed(self.entries):
            if entry.weight == 0:
                continue
            for name in names:
                if name in entry.trains:
                    return entry.trains[name]
        return None

    def trains(self, names: tuple[str, ...], default: bool = True) -> bool:
        """True if the parameter trains after all selections.

        Args:
            names: All names of the parameter.
            default: Result if no entry names it.
        """
        decided = self.decided(names)
        return default if decided is None else decided

    def standing(self, entry: Entry) -> Entry:
        """The entry after all merges in the journal.

        A merge can give a site other tensors (a simpler form, a residual branch), or remove a site because the adapter
        has been merged into the quantized codes there.
        """
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
        """True if the journal contains a merge."""
        return any(e.kind == "merge" for e in self.entries)

    def to_json(self) -> list[dict[str, Any]]:
        """The entries as JSON-able data."""
        return [e.to_json() for e in self.entries]

    @staticmethod
    def from_json(data: Any) -> Journal:
        """The journal of data that `to_json` returned.

        Raises:
            JournalError: The data are not a list of readable entries.
        """
        if not isinstance(data, list):
            raise JournalError("the journal is not a list of entries; give a directory that surgery saved")
        for number, item in enumerate(data, 1):
            check_entry(item, number)
        return Journal(tuple(Entry.from_json(item) for item in data))
