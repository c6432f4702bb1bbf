"""Folds rows that repeat with the number of a block: `layers.0–29 ×30` stands for thirty equal rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row of a listing.

    Attributes:
        path: Module path that it belongs to.
        alike: Facts that two rows must have in common to be shown as one.
        value: The row itself.
    """

    path: str
    alike: Any
    value: Any


@dataclass
class Folded:
    """A module path with its rows, or several numbered ones that are equal.

    Attributes:
        name: Name below its parent, such as "self_attn" or "layers.0–29".
        count: Number of equal modules that it stands for.
        rows: Rows of the module itself; of several equal ones, those of the first.
        children: Modules below it.
        below: All rows of it and below, also those that are not shown.
        cut: True if its children are left out because they are too deep.
    """

    name: str
    count: int = 1
    rows: list[Row] = field(default_factory=list)
    children: list[Folded] = field(default_factory=list)
    below: list[Row] = field(default_factory=list)
    cut: bool = False

    def lines(self, above: str = "", count: int = 1) -> Iterator[tuple[str, int, Folded]]:
        """Path, number of places and item of each module that has rows or is cut."""
        path = f"{above}.{self.name}" if above and self.name else self.name or above
        count *= self.count
        if self.rows or self.cut:
            yield path, count, self
        for child in self.children:
            yield from child.lines(path, count)


@dataclass(frozen=True)
class Folding:
    """Options of shortening a listing.

    Attributes:
        depth: Number of levels to show, None for all.
        role: Glob of the roles to show, such as "attn.*"; "" for all.
        all: Fold nothing.
    """

    depth: int | None = None
    role: str = ""
    all: bool = False

    def tree(self, rows: Iterable[Row]) -> Folded:
        """The tree of the module paths of rows, folded and cut."""
        root = _Module("")
        for row in rows:
            item = root
            for part in row.path.split(".") if row.path else ():
                item = item.children.setdefault(part, _Module(part))
            item.rows.append(row)
        return self._show(root, 0)

    def _show(self, module: _Module, level: int) -> Folded:
        found = Folded(module.name, rows=list(module.rows), below=list(module.walk()))
        # A ModuleList and the modules in it are one level, named "layers.0–29".
        is_list = not module.rows and all(child.numbered for child in module.children.values())
        if self.depth is not None and level >= self.depth and module.children and not is_list:
            found.cut = True
            return found
        for run in module.runs(self.all):
            child = self._show(run[0], level if is_list else level + 1)
            child.name = run[0].name if len(run) == 1 else f"{run[0].name}–{run[-1].name}"
            child.count = len(run)
            child.below = [row for item in run for row in item.walk()]
            inner = child.children
            if not child.rows and child.count == 1 and inner and all(c.name[0].isdigit() for c in inner):
                for each in inner:
                    each.name = f"{child.name}.{each.name}"
                found.children += inner
            elif not child.rows and child.count == 1 and len(inner) == 1 and not child.cut:
                inner[0].name = f"{child.name}.{inner[0].name}"
                found.children += inner
            else:
                found.children.append(child)
        return found


class _Module:
    """A module path with its rows and the modules below it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[Row] = []
        self.children: dict[str, _Module] = {}
        self._alike: Hashable = None

    @property
    def numbered(self) -> bool:
        """True if the name is a number."""
        return self.name.isascii() and self.name.isdigit()

    @property
    def alike(self) -> Hashable:
        """Facts in which two modules must agree to be shown as one. Call it only when all rows are there."""
        if self._alike is None:
            inner = tuple((child.name, child.alike) for child in self.children.values())
            self._alike = (tuple(row.alike for row in self.rows), inner)
        return self._alike

    def walk(self) -> Iterator[Row]:
        """All rows here and below."""
        yield from self.rows
        for child in self.children.values():
            yield from child.walk()

    def runs(self, single: bool) -> list[list[_Module]]:
        """Runs of children with consecutive numbers that are alike; `single` makes a run of each child."""
        runs: list[list[_Module]] = []
        children = list(self.children.values())
        if all(child.numbered for child in children):
            children.sort(key=lambda child: int(child.name))
        for child in children:
            if runs and not single and _follows(runs[-1][-1], child):
                runs[-1].append(child)
            else:
                runs.append([child])
        return runs


def _follows(one: _Module, other: _Module) -> bool:
    return (
        one.numbered and other.numbered and int(one.name) + 1 == int(other.name) and one.alike == other.alike
    )


def times(count: int) -> str:
    """Number of rows that a line stands for: " ×30", or "" for one."""
    return f" ×{count}" if count > 1 else ""


def selected(rows: Sequence[Row], roles: Sequence[str], pattern: str) -> list[Row]:
    """Rows whose role matches a glob.

    Args:
        rows: The rows.
        roles: The role of each row.
        pattern: The glob; "" selects all.
    """
    wanted = [each.strip() for each in pattern.split(",") if each.strip()]
    return [
        row
        for row, role in zip(rows, roles, strict=True)
        if not wanted or any(fnmatchcase(role, each) for each in wanted)
    ]
