"""Layers of surgery/ and their violations: upward imports, circular imports, hidden imports.

LAYERS is the only table: docs/architecture.md prints it, and tests/test_architecture.py checks the code against it.
`python -m tests.architecture` lists every violation.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up. A package may import those named in its row, and nothing else of surgery.
LAYERS: dict[str, tuple[str, ...]] = {
    "common": (),
    "capture": ("common",),
    "graph": ("common",),
    "engine": ("graph", "capture", "common"),
    "passes": ("engine", "graph", "capture", "common"),
    "store": ("passes", "engine", "graph", "capture", "common"),
    "live": ("store", "passes", "engine", "graph", "capture", "common"),
    "export": ("live", "store", "passes", "engine", "graph", "capture", "common"),
    "train": ("live", "store", "passes", "engine", "graph", "capture", "common"),
    "testing": ("train", "export", "live", "store", "passes", "engine", "graph", "capture", "common"),
    "cli": ("train", "export", "live", "store", "passes", "engine", "graph", "capture", "common"),
}
# Files at the root stand above every package.
ROOM_AT_THE_ROOT = 16
# A function-level import is allowed for a third-party library, and of surgery itself only in these files, which
# exist to start quickly: a name is imported when it is first asked for.
LAZY = ("cli/", "__init__.py", "__main__.py", "common/plugins.py", "api/")


@dataclass(frozen=True)
class Import:
    """One import of a file of surgery by another. kind: "module", "type checking" or "function"."""

    source: str
    line: int
    target: str
    kind: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target} ({self.kind})"


def files(root: Path) -> dict[str, Path]:
    """Path below surgery/ -> file."""
    top = root / "surgery"
    return {path.relative_to(top).as_posix(): path for path in sorted(top.rglob("*.py"))}


def _modules(names: dict[str, Path]) -> dict[str, str]:
    """Dotted module name -> path below surgery/."""
    found = {}
    for name in names:
        dotted = "surgery." + name.removesuffix(".py").replace("/", ".")
        found[dotted.removesuffix(".__init__")] = name
    return found


def imports(root: Path = ROOT) -> list[Import]:
    """Every import between files of surgery/: at the top, under TYPE_CHECKING and inside functions."""
    paths = files(root)
    modules = _modules(paths)
    found: list[Import] = []
    for name, path in paths.items():
        package = "surgery." + name.removesuffix(".py").replace("/", ".")
        package = (
            package.removesuffix(".__init__") if name.endswith("__init__.py") else package.rpartition(".")[0]
        )
        for node, kind in _statements(ast.parse(path.read_text()), "module"):
            for target in _targets(node, modules, package):
                if target != name:
                    found.append(Import(name, node.lineno, target, kind))
    return found


def _statements(node: ast.AST, kind: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, kind
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _statements(child, "function")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for inner in child.body:
                yield from _statements(ast.Module([inner], []), "type checking" if kind == "module" else kind)
            for inner in child.orelse:
                yield from _statements(ast.Module([inner], []), kind)
        else:
            yield from _statements(child, kind)


def _targets(node: ast.Import | ast.ImportFrom, modules: dict[str, str], package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        yield from {modules[name] for name in names if name in modules}
        return
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, *([node.module] if node.module else [])])
    whole = False
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        if inner in modules:
            yield modules[inner]
        else:
            whole = True
    if whole and base in modules:
        yield modules[base]


def package_of(name: str) -> str:
    """The package of a path below surgery/, or "" at the root (surgery.api counts as the root)."""
    head = name.partition("/")[0] if "/" in name else ""
    return "" if head == "api" else head


def upward(found: list[Import]) -> list[Import]:
    """Imports that the table does not allow."""
    bad = []
    for each in found:
        source, target = package_of(each.source), package_of(each.target)
        if source == target or not source:
            continue
        if target not in LAYERS.get(source, ()):
            bad.append(each)
    return bad


def circles(found: list[Import]) -> list[list[str]]:
    """Files that import each other in a circle, however the imports are written."""
    graph: networkx.DiGraph = networkx.DiGraph()
    graph.add_edges_from((each.source, each.target) for each in found)
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def hidden(found: list[Import]) -> list[Import]:
    """Imports of surgery inside functions, where start-up time does not need them."""
    return [each for each in found if each.kind == "function" and not each.source.startswith(LAZY)]


def unknown(root: Path = ROOT) -> list[str]:
    """Packages that the table does not list."""
    return sorted({package_of(name) for name in files(root)} - set(LAYERS) - {""})


def at_the_root(root: Path = ROOT) -> list[str]:
    return sorted(path.name for path in (root / "surgery").iterdir() if path.name != "__pycache__")


def table() -> str:
    """The layers as a table in Markdown."""
    rows = ["| package | may import |", "|---|---|"]
    for name, below in LAYERS.items():
        rows.append(f"| `{name}` | {', '.join(f'`{other}`' for other in below) or 'nothing of surgery'} |")
    return "\n".join(rows)


def faults(root: Path = ROOT) -> list[str]:
    """Every violation, one line each."""
    found = imports(root)
    lines = [f"{each}: {package_of(each.source)} may not import that" for each in upward(found)]
    lines += [f"a circle of {len(group)} files: {', '.join(group)}" for group in circles(found)]
    lines += [f"{each}: move it to the top of the file" for each in hidden(found)]
    lines += [f"the package {name!r} is in no row of LAYERS" for name in unknown(root)]
    entries = at_the_root(root)
    if len(entries) > ROOM_AT_THE_ROOT:
        lines.append(f"surgery/ has {len(entries)} entries, over {ROOM_AT_THE_ROOT}: {', '.join(entries)}")
    return lines


if __name__ == "__main__":
    print("\n".join(faults()) or "no fault")
    sys.exit(bool(faults()))
