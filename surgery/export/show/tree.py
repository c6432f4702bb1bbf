"""The modules of a program as a tree. Runs of equal blocks are folded into one item: "layers.0–29 ×30"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.export.show.model import ModelData, Op, Weight


@dataclass
class Item:
    """A module, or a run of equal modules.

    Attributes:
        path: Path of the module; of a run, the path of its first module.
        name: Name below its parent, such as "self_attn" or "layers.0–29".
        cls: Name of its class, or "".
        children: Modules in it, in the order in which they run; of a run, its modules.
        ops: Ops of its own forward, without those of its children.
        weights: Weights of its own.
        parameters: Number of parameters in it and below; a tied one counts where it is named first.
        trainable: Number of those that train.
        bytes: Size of all tensors in it and below, quantized codes and buffers included.
        marks: Ids of the journal entries that inserted something in it or below.
        errors: Errors of replaced weights in it or below.
        moved: Difference of the value that leaves it, see `Op.moved`; None if it was not compared.
        most: Largest difference of a value in it or below; None if nothing was compared.
        changes: In a difference, number of ops and weights by kind of change.
        run: True for a run of equal modules.
    """

    path: str
    name: str
    cls: str = ""
    children: list[Item] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    parameters: int = 0
    trainable: int = 0
    bytes: int = 0
    marks: tuple[str, ...] = ()
    errors: tuple[float, ...] = ()
    moved: float | None = None
    most: float | None = None
    changes: dict[str, int] = field(default_factory=dict)
    run: bool = False
    signature: Any = None

    def walk(self) -> Iterator[Item]:
        """The item and all items below, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def build_tree(data: ModelData) -> Item:
    """The tree of the modules of a program, with folded runs.

    A module that runs no op itself, like a ModuleList, is left out: its children are named "layers.0" below its parent.
    """
    ops: dict[str, list[Op]] = defaultdict(list)
    for op in data.ops:
        ops[op.module].append(op)
    called = _with_parents(ops, data)
    weights: dict[str, list[Weight]] = defaultdict(list)
    for weight in data.weights.values():
        weights[_owner(weight.name, called)].append(weight)
    cls = data.classes.get("", "")
    root = Item("", cls or data.title, cls)
    items = {"": root}
    for path in called:
        owner = _owner(path, items)
        name = path[len(owner) + 1 :] if owner else path
        items[path] = Item(path, name, data.classes.get(path.partition("@")[0], ""))
        items[owner].children.append(items[path])
    for path, item in items.items():
        item.ops, item.weights = ops.get(path, []), weights.get(path, [])
    _sum(root, data)
    _set_moved(root, data)
    _fold(root)
    return root


def _with_parents(ops: dict[str, list[Op]], data: ModelData) -> dict[str, None]:
    """Paths of the modules to show, in the order in which they first run; parents come before children."""
    found: dict[str, None] = {}
    for path in ops:
        parts = path.split(".") if path else []
        for length in range(1, len(parts) + 1):
            above = ".".join(parts[:length])
            # torch.export names no container of the kind of ModuleList, which has no forward.
            if above in ops or data.classes.get(above) not in ("ModuleList", "ModuleDict", "", None):
                found[above] = None
    return found


def _owner(name: str, paths: Any) -> str:
    """The longest of the paths that a dotted name lies below; "" if there is none."""
    while name:
        name = name.rpartition(".")[0]
        if name in paths:
            return name
    return ""


def _sum(item: Item, data: ModelData) -> None:
    """Set the figures of an item and of those below."""
    for child in item.children:
        _sum(child, data)
    own = [w for w in item.weights if w.name in data.parameters and w.change != "-"]
    item.parameters = sum(data.parameters[w.name] for w in own) + sum(c.parameters for c in item.children)
    item.trainable = sum(w.size for w in own if w.trains) + sum(c.trainable for c in item.children)
    item.bytes = sum(w.bytes for w in item.weights if w.change != "-") + sum(c.bytes for c in item.children)
    marks = (
        [o.by for o in item.ops] + [w.by for w in item.weights] + [m for c in item.children for m in c.marks]
    )
    item.marks = tuple(dict.fromkeys(mark for mark in marks if mark))
    item.errors = tuple(
        dict.fromkeys(
            [w.error for w in item.weights if w.error is not None]
            + [e for c in item.children for e in c.errors]
        )
    )
    item.most = _largest([o.moved for o in item.ops] + [c.most for c in item.children])
    counts: dict[str, int] = defaultdict(int)
    for change in [o.change for o in item.ops] + [w.change for w in item.weights]:
        if change:
            counts[change] += 1
    for child in item.children:
        for kind, number in child.changes.items():
            counts[kind] += number
    item.changes = dict(counts)
    # Two modules with the same signature differ only in the values of their tensors.
    item.signature = (
        item.cls,
        tuple((o.target, o.shape, o.dtype, o.role, o.by, o.change) for o in item.ops),
        tuple(
            (w.name[len(item.path) + 1 :], w.shape, w.dtype, w.trains, w.by, w.change, bool(w.tied))
            for w in item.weights
        ),
        tuple((c.name, c.signature) for c in item.children),
    )


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _set_moved(root: Item, data: ModelData) -> None:
    """Set `moved` of every item: that of its last op which was compared."""
    last: dict[str, float] = {}
    for op in data.ops:
        path = op.module
        while op.moved is not None:
            last[path] = op.moved
            if not path:
                break
            path = path.rpartition(".")[0]
    for item in root.walk():
        item.moved = last.get(item.path)


def _fold(item: Item) -> None:
    """Replace runs of equal children by one item each, here and below."""
    found: list[Item] = []
    for run in _runs(item.children):
        if len(run) == 1:
            found.append(run[0])
            continue
        first, last = run[0], run[-1]
        stem, number, rest = _numbered(first.name)
        name = f"{stem}{number}–{_numbered(last.name)[1]}{rest}"
        found.append(
            Item(
                path=first.path,
                name=name,
                cls=first.cls,
                children=list(run),
                parameters=sum(i.parameters for i in run),
                trainable=sum(i.trainable for i in run),
                bytes=sum(i.bytes for i in run),
                marks=first.marks,
                errors=tuple(e for i in run for e in i.errors),
                moved=last.moved,
                most=_largest([i.most for i in run]),
                changes={k: sum(i.changes.get(k, 0) for i in run) for k in first.changes},
                run=True,
            )
        )
    for child in item.children:
        _fold(child)
    item.children = found


def _runs(children: Sequence[Item]) -> Iterator[list[Item]]:
    run: list[Item] = []
    for child in children:
        if run and _follows(run[-1], child):
            run.append(child)
            continue
        if run:
            yield run
        run = [child]
    if run:
        yield run


def _follows(one: Item, other: Item) -> bool:
    """True if another item has the next number of one, and the same signature."""
    here, there = _numbered(one.name), _numbered(other.name)
    if here[1] is None or there[1] is None or (here[0], here[2]) != (there[0], there[2]):
        return False
    return here[1] + 1 == there[1] and one.signature == other.signature


def _numbered(name: str) -> tuple[str, int | None, str]:
    """A name as (text before its last number, number, text after it): "layers.3" -> ("layers.", 3, "")."""
    parts = name.split(".")
    for place in range(len(parts) - 1, -1, -1):
        # Not "01": the name of a run is written from the numbers of its first and last module.
        if parts[place].isascii() and parts[place].isdigit() and str(int(parts[place])) == parts[place]:
            before, after = parts[:place], parts[place + 1 :]
            return "".join(f"{p}." for p in before), int(parts[place]), "".join(f".{p}" for p in after)
    return name, None, ""
