"""The custom models and configurations of PEFT's own test suite (`TEST_CASES` in its tests/test_custom_models.py).

They are in PEFT's sdist and not in its wheel. pip fetches the sdist once, pinned by version and hash, into `.cache/`.
The test module imports packages that are not needed here, so only its definitions are executed, not those imports.
"""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
MODULE = f"peft-{VERSION}/tests/test_custom_models.py"
CACHE = Path(".cache") / "peft"
# Modules of which the test module needs names to define its cases and models.
_KNOWN = {"torch", "peft", "transformers", "copy", "re"}


@dataclass(frozen=True)
class Case:
    """One row: a title, the name of a model, the class of a configuration and its arguments."""

    number: int
    title: str
    model: str
    config_cls: Any
    kwargs: dict[str, Any]

    @property
    def method(self) -> str:
        """PEFT's type, such as "LORA"."""
        return str(self.config_cls(**self.kwargs).peft_type.value)


def fetch() -> Path:
    """The sdist, downloaded by pip if it is not in the cache. Raises SystemExit if it cannot be had."""
    installed = importlib.metadata.version("peft")
    if installed != VERSION:
        raise SystemExit(f"the cases are those of peft {VERSION}, but {installed} is installed; pin its hash")
    path = CACHE / f"peft-{VERSION}.tar.gz"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        wanted = CACHE / "requirements.txt"
        wanted.write_text(f"peft=={VERSION} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "--require-hashes", "-r", str(wanted), "-d", str(CACHE)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"pip cannot download peft=={VERSION}; the table needs its sdist")
    return path


def definitions() -> dict[str, Any]:
    """Names that the test module defines outside of its tests."""
    with tarfile.open(fetch()) as archive:
        member = archive.extractfile(MODULE)
        assert member is not None
        tree = ast.parse(member.read())
    kept = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            wanted = not node.level and (node.module or "").partition(".")[0] in _KNOWN
        elif isinstance(node, ast.Import):
            wanted = all(name.name.partition(".")[0] in _KNOWN for name in node.names)
        elif isinstance(node, ast.ClassDef):
            wanted = not node.name.startswith("Test")
        else:
            # The other tables and functions belong to tests.
            wanted = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TEST_CASES"
        if wanted:
            kept.append(node)
    found: dict[str, Any] = {"__name__": "peft_cases"}
    exec(compile(ast.Module(kept, []), MODULE, "exec"), found)
    return found


def cases() -> tuple[list[Case], Any]:
    """All rows, and the class whose `from_pretrained(name)` makes a model."""
    found = definitions()
    rows = [Case(number, *row) for number, row in enumerate(found["TEST_CASES"], 1)]
    return rows, found["MockTransformerWrapper"]
