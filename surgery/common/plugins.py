"""Plugin managers. Built-in and installed plugins use the same hooks.

A manager has no global state: every program keeps the manager that it was loaded with.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar, cast

import pluggy

from surgery.common import hooks
from surgery.common.errors import PluginError, SurgeryError, nearest
from surgery.common.options import Configured

GROUP = "surgery"
CORE = "torch-surgery"
# Built-in plugins are listed by name, because this module is below them in the layers. A new manager imports them.
DEFAULT_PLUGINS = (
    "surgery.graph.ops",
    "surgery.capture.loaders",
    "surgery.passes",
    "surgery.train.objectives",
    "surgery.export.lowerings",
    "surgery.export.writers",
    "surgery.store.writers",
    "surgery.live.model",
)


T = TypeVar("T", bound=type[Configured])


@dataclass(frozen=True)
class Info(Generic[T]):
    """A registered class and the distribution that registers it."""

    cls: T
    distribution: str
    version: str

    @property
    def name(self) -> str:
        return self.cls.name


@dataclass
class Plugins:
    """A plugin manager with its registries.

    Attributes:
        manager: the pluggy manager.
        distributions: plugin name -> name and version of its distribution.
        broken: entry point that cannot be loaded -> reason.
    """

    manager: pluggy.PluginManager
    distributions: dict[str, tuple[str, str]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    _made: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def hook(self) -> Any:
        return self.manager.hook

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make()`, computed at the first call for a key and kept as long as the manager."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def named(self, hook: str, base: T, plural: str) -> dict[str, Info[T]]:
        """Classes that all plugins return for a hook: name -> class and distribution.

        Args:
            hook: name of the hook.
            base: class that each must derive from.
            plural: noun for such classes in messages.

        Raises:
            PluginError: a plugin returns something else, or two distributions register one name.
        """
        found: dict[str, Info[T]] = {}
        for impl in self.implementations(hook):
            distribution, version = self.distribution_of(impl)
            given = self.call(impl)
            if not isinstance(given, (list, tuple)):
                raise PluginError(
                    f"plugin {distribution!r} returns {given!r} from {hook}; return a list of classes, such as [MyPass]"
                )
            for cls in given:
                if not (isinstance(cls, type) and issubclass(cls, base) and cls.name):
                    raise PluginError(
                        f"plugin {distribution!r} registers {cls!r}, which is not a {base._kind} class with a name"
                    )
                other = found.get(cls.name)
                if other is not None:
                    raise PluginError(
                        f"two {plural} are named {cls.name!r}: one from {other.distribution!r}, one from "
                        f"{distribution!r}; uninstall one of them"
                    )
                found[cls.name] = Info(cast(T, cls), distribution, version)
        return found

    @cached_property
    def writers(self) -> dict[str, Callable[..., Any]]:
        """Format -> function (program, path, **options) that writes a program."""
        return self._table("surgery_writers")

    def writer(self, format: str) -> Callable[..., Any]:
        """The writer of a format. Raises PluginError, with similar names, if there is none."""
        if format not in self.writers:
            hint = nearest(format, self.writers) or f"; there are {', '.join(sorted(self.writers))}"
            raise PluginError(f"no plugin writes the format {format!r}{hint}")
        return self.writers[format]

    @cached_property
    def weight_ops(self) -> dict[Any, Any]:
        """Ops with a weight: torch op -> `surgery.graph.ops.WeightOp`."""
        return self._table("surgery_weight_ops")

    @cached_property
    def lowerings(self) -> dict[Any, Any]:
        """ONNX forms of ops: torch op -> onnxscript function."""
        return self._table("surgery_onnx_lowerings")

    def _table(self, hook: str) -> dict[Any, Any]:
        """The tables that all plugins return for a hook, merged. A later plugin overrides an earlier one."""
        merged: dict[Any, Any] = {}
        for impl in self.implementations(hook):
            merged.update(self.call(impl))
        return merged

    def implementations(self, hook: str) -> list[Any]:
        """The implementations of a hook, built-in ones first."""
        return list(getattr(self.manager.hook, hook).get_hookimpls())

    def distribution_of(self, impl: Any) -> tuple[str, str]:
        """Name and version of the distribution of a hook implementation."""
        return self.distributions.get(impl.plugin_name, (impl.plugin_name, ""))

    def call(self, impl: Any, **arguments: Any) -> Any:
        """The result of one implementation of a hook.

        Args:
            impl: implementation, from `implementations`.
            **arguments: arguments of the hook; the implementation gets those that it declares.

        Raises:
            PluginError: the implementation fails with anything but a SurgeryError; the message names its distribution.
        """
        try:
            return impl.function(*(arguments[name] for name in impl.argnames))
        except SurgeryError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise PluginError(
                f"plugin {self.distribution_of(impl)[0]!r} fails in {impl.function.__name__}: "
                f"{type(error).__name__}: {first}; uninstall it, or report it to its author"
            ) from error


def make_plugin_manager(entry_points: bool = True, plugins: tuple[Any, ...] = ()) -> Plugins:
    """Make a plugin manager with the built-in plugins, installed plugins and given plugins.

    Args:
        entry_points: load the installed entry points of group `surgery`. One that cannot be loaded is listed in
            `Plugins.broken`, and the others still work.
        plugins: further plugins, objects or modules with hook implementations.

    Raises:
        pluggy.PluginValidationError: one of `plugins` implements an unknown hook.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hooks)
    found = Plugins(manager)
    for name in DEFAULT_PLUGINS:
        manager.register(import_module(name), name=name)
        found.distributions[name] = (CORE, _version(CORE))
    if entry_points:
        _load_entry_points(found)
    for plugin in plugins:
        name = manager.register(plugin) or repr(plugin)
        found.distributions[name] = (getattr(plugin, "__name__", type(plugin).__name__), "")
    manager.check_pending()
    return found


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _load_entry_points(found: Plugins) -> None:
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: p.name):
        distribution = point.dist.name if point.dist else point.name
        title = f"{distribution} ({point.value})"
        plugin = None
        try:
            # Any exception may come from a plugin's import. It must not stop the other plugins.
            plugin = point.load()
            name = found.manager.register(plugin, name=f"{distribution}:{point.name}")
            # Finds misspelt hooks while it is known which plugin has them.
            found.manager.check_pending()
            found.distributions[name or point.name] = (distribution, _version(distribution))
        except Exception as error:
            if plugin is not None and found.manager.is_registered(plugin):
                found.manager.unregister(plugin)
            found.broken[title] = f"{type(error).__name__}: {error}".splitlines()[0]
