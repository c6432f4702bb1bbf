"""The plugins of examples/plugins as modules."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "examples" / "plugins"


def example_plugin(name: str) -> ModuleType:
    """The module of a plugin file, by its name without .py; imported once."""
    known = f"example_plugin_{name}"
    if known not in sys.modules:
        spec = util.spec_from_file_location(known, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[known] = util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]
