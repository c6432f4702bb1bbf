"""Plugins without a package: a Python file, or a single class of a pass or an objective."""

from __future__ import annotations

import re
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

from surgery.common import hooks
from surgery.common.errors import PluginError
from surgery.common.options import Configured

# Kind of a class with options -> hook that registers such classes.
_HOOKS = {"pass": "surgery_passes", "objective": "surgery_objectives"}


class Classes:
    """A plugin of single classes, which need no hooks of their own.

    Attributes:
        __name__: File that defines the first class; messages and journals name it.
    """

    def __init__(self, classes: tuple[type[Configured], ...], name: str) -> None:
        """Args:
        classes: Classes of passes and objectives, each with a name.
        name: File that defines them.
        """
        self.__name__ = name
        for kind, hook in _HOOKS.items():
            found = [cls for cls in classes if cls._kind == kind]
            if found:
                setattr(self, hook, _hook(hook, found))


def _hook(name: str, classes: list[type[Configured]]) -> Any:
    def implementation() -> list[type[Configured]]:
        return classes

    implementation.__name__ = name
    return hooks.hookimpl(implementation)


def plugin_of(given: Any) -> Any:
    """The plugin that was given: an object with hooks, a path of a Python file, or a class of a pass or an objective.

    Raises:
        PluginError: The file does not exist or cannot be run, or has neither hooks nor classes.
    """
    if isinstance(given, (str, Path)):
        return load_file(Path(given))
    if isinstance(given, type) and issubclass(given, Configured):
        if not given.name or given._kind not in _HOOKS:
            raise PluginError(f"{given.__name__} is not a pass or an objective with a name; give it a `name`")
        return Classes((given,), file_of(given))
    return given


def file_of(cls: type) -> str:
    """Name of the file that defines a class, such as "my_pass.py"; "__main__" for a class of an interactive session."""
    module = sys.modules.get(cls.__module__)
    path = getattr(module, "__file__", None)
    return _plain(Path(path).name) if path else "__main__"


def is_file(distribution: str) -> bool:
    """True if this is the name of a file or a session, as `file_of` gives it, and not of an installed distribution."""
    return distribution.endswith(".py") or distribution == "__main__"


def load_file(path: Path) -> Any:
    """Run a Python file and return it as a plugin.

    Its hooks are used if it has some. Otherwise the passes and objectives that it defines are registered.

    Raises:
        PluginError: The file does not exist or cannot be run, or has neither hooks nor classes.
    """
    if path.suffix != ".py" or not path.is_file():
        raise PluginError(f"--plugin {path}: no such Python file; give the path of a .py file")
    name = path.stem
    if name in sys.modules and not _same(sys.modules[name], path):
        # Another module of this name must stay importable.
        name = f"surgery_plugin_{name}"
    spec = util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic resolves annotations there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        first = (str(error).splitlines() or [""])[0]
        raise PluginError(f"--plugin {path}: it cannot be run: {type(error).__name__}: {first}") from error
    if any(known.startswith("surgery_") for known in vars(module)):
        module.__name__ = _plain(path.name)
        return module
    classes = tuple(
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Configured)
        and value.__module__ == name
        and value.name
    )
    if not classes:
        raise PluginError(
            f"--plugin {path}: it defines no pass or objective with a `name`, and has no hook such as surgery_passes"
        )
    return Classes(classes, _plain(path.name))


def _same(module: ModuleType, path: Path) -> bool:
    known = getattr(module, "__file__", None)
    return known is not None and Path(known).resolve() == path.resolve()


def _plain(name: str) -> str:
    """The name with only the characters that a saved directory allows for a distribution."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-128:]
