"""Errors in the code of plugins: reported with the class, the hook, the site and the distribution, as one line."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any
from weakref import WeakKeyDictionary

from surgery.common.errors import PluginError, SurgeryError

# Distribution of each registered class, for messages.
_PROVIDED: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def provided_by(cls: type, distribution: str) -> None:
    """Note the distribution that registers a class."""
    _PROVIDED[cls] = distribution


def distribution_of(cls: type) -> str:
    """Name of the distribution of a class: the one that registered it, or the one that has its module."""
    if cls in _PROVIDED:
        return _PROVIDED[cls]
    top = cls.__module__.partition(".")[0]
    return next(iter(metadata.packages_distributions().get(top, ())), cls.__module__)


def is_core(cls: type) -> bool:
    """True for classes of surgery itself, whose errors are its own."""
    return cls.__module__ == "surgery" or cls.__module__.startswith("surgery.")


@contextlib.contextmanager
def reported(cls: type, kind: str, hook: str, where: str = "") -> Iterator[None]:
    """Context manager: report any other error than a SurgeryError as one of a plugin's class.

    Args:
        cls: The class, with a `name`.
        kind: Noun for the class, such as "pass".
        hook: Method that runs.
        where: Path of the site, or "".

    Raises:
        PluginError: The code fails; the message names the class, its distribution, the hook and the site.
    """
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise failure(cls, kind, hook, error, where) from error


def failure(cls: type, kind: str, hook: str, error: Exception, where: str = "") -> PluginError:
    """The error for an exception in the code of a plugin; see `reported`."""
    name = getattr(cls, "name", "") or cls.__name__
    said = next(iter(str(error).strip().splitlines()), "")[:300]
    return PluginError(
        f"{kind} {name!r} of {distribution_of(cls)!r} fails in {hook}{f' at {where}' if where else ''}: "
        f"{type(error).__name__}{f': {said}' if said else ''}; report it to its author, or uninstall it"
    )


def guard(cls: type, kind: str) -> None:
    """Wrap what a plugin's class overrides, methods and properties, so that their errors are reported.

    Args:
        cls: The class, just created; classes of surgery itself are left alone.
        kind: Noun for the class, such as "pass".
    """
    if is_core(cls):
        return
    for name, member in list(vars(cls).items()):
        overrides = any(name in vars(base) for base in cls.__mro__[1:] if is_core(base))
        if name.startswith("_") or not overrides:
            continue
        if inspect.isfunction(member) and not inspect.isgeneratorfunction(member):
            setattr(cls, name, _guarded(member, cls, kind, name))
        elif isinstance(member, property) and member.fget is not None:
            setattr(cls, name, property(_guarded(member.fget, cls, kind, name), member.fset, member.fdel))


def _guarded(function: Callable[..., Any], cls: type, kind: str, hook: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(self, *args, **kwargs)
        except SurgeryError:
            raise
        except Exception as error:
            where = getattr(args[0], "path", "") if args else ""
            raise failure(cls, kind, hook, error, where if isinstance(where, str) else "") from error

    return run
