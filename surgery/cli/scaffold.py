"""Writes the package of a new plugin from the templates of its kind."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from surgery.common.errors import SurgeryError
from surgery.common.files import staged_directory

_TEMPLATES = Path(__file__).with_name("templates")
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class _Kind:
    """Texts of the package of one kind of plugin.

    Attributes:
        summary: Description of the plugin; {short} is its short name.
        use: Command that uses it, for the README.
        group: Group of its entry point.
        entry: The entry point.
        needs: Distributions that it needs beside torch-surgery and torch.
        tests_need: Extras and distributions that its tests need.
    """

    summary: str
    use: str
    group: str = "surgery"
    entry: str = '{short} = "{package}"'
    needs: tuple[str, ...] = ()
    tests_need: tuple[str, ...] = ()


_KINDS = {
    "pass": _Kind(
        "Pass {short} for torch-surgery: a learned gate for every output feature of a layer.",
        'surgery apply MODEL --pass {short} --target "mlp.*" -o adapted/',
    ),
    "weight-op": _Kind(
        "Op {package}::linear for torch-surgery: a linear layer with int8 codes, which adapters attach to.",
        "surgery plugins",
        tests_need=("torch-surgery[onnx]",),
    ),
    "objective": _Kind(
        "Objective {short} for torch-surgery: the focal loss of a classifier.",
        "surgery train hf:BASE --objective {short} --data reviews.csv -o trained/",
        tests_need=("torch-surgery[hf,train]",),
    ),
    "loader": _Kind(
        "Loader {short}: for torch-surgery: models from a directory of one's own.",
        "surgery inspect {short}:DIR",
        needs=("safetensors",),
    ),
    "lowering": _Kind(
        "ONNX form of the op {package}::{op} for torch-surgery.",
        "surgery plugins",
        tests_need=("torch-surgery[onnx]",),
    ),
    "command": _Kind(
        "Command {short} for the command line of torch-surgery.",
        "surgery {short} MODEL",
        group="surgery.commands",
        entry='{short} = "{package}:command"',
        needs=("click",),
        tests_need=("torch-surgery[hf]",),
    ),
}


def write_plugin(name: str, kind: str, folder: Path) -> list[str]:
    """Write the package of a new plugin. Nothing is left behind where that fails.

    Args:
        name: Name of the distribution, such as "torch-surgery-gate".
        kind: One of the kinds.
        folder: Directory to write, which must not exist.

    Returns:
        The files, relative to the folder.

    Raises:
        SurgeryError: The name is no name of a distribution, or the folder exists.
    """
    if not _NAME.fullmatch(name) or len(name) > 60:
        raise SurgeryError(
            f"{name!r} is no name of a plugin; use lower-case words and hyphens: torch-surgery-gate"
        )
    short = name.removeprefix("torch-surgery-")
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or package in ("surgery", "torch") or short in ("surgery", "torch"):
        raise SurgeryError(f"{name!r} would be a Python module of that name; choose another")
    if folder.exists():
        raise SurgeryError(f"{folder} exists; choose another name, or another -o")
    about = _KINDS[kind]
    words = {
        "distribution": name,
        "package": package,
        "short": short,
        "op": short.replace("-", "_"),
        "Class": "".join(word.capitalize() for word in short.split("-")),
    }
    filled = {
        **words,
        "summary": about.summary.format(**words),
        "use": about.use.format(**words),
        "group": about.group,
        "entry": about.entry.format(**words),
        "dependencies": ", ".join(
            f'"{need}"' for need in ("torch-surgery>=0.1", "torch>=2.11", *about.needs)
        ),
        "test_dependencies": "".join(f', "{need}"' for need in about.tests_need),
    }
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        ".github/workflows/test.yml": "test.yml",
        f"{package}/__init__.py": f"{kind}.py",
        f"tests/test_{words['op']}.py": f"test_{kind}.py",
    }
    with staged_directory(folder) as stage:
        for path, template in files.items():
            text = Template((_TEMPLATES / f"{template}.txt").read_text()).substitute(filled)
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            (stage / path).write_text(text)
    return list(files)
