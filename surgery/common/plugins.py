"""Plugin managers. Built-in and installed plugins use the same hooks.

A manager has no global state: every program keeps the manager that it was loaded with.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar, cast

import pluggy

from surgery.common import hooks
from surgery.common.errors import PluginError, SurgeryError, nearest
from surgery.common.guard import provided_by
from surgery.common.options import Configured
from surgery.common.plugin_files import plugin_of

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


# Raises PluginError if a hook returned a wrong value. Each package has those of the hooks that it reads.
Check = Callable[[Any], None]


@dataclass
class Plugins:
    """A plugin manager with its registries.

    Attributes:
        manager: the pluggy manager.
        distributions: plugin name -> name and version of its distribution.
        broken: entry point that cannot be used -> reason.
        notes: sentences about parts of plugins that are left out.
    """

    manager: pluggy.PluginManager
    distributions: dict[str, tuple[str, str]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
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
            check_classes(given, hook, base)
            for cls in given:
                other = found.get(cls.name)
                if other is not None:
                    raise PluginError(
                        f"two {plural} are named {cls.name!r}: one from {other.distribution!r}, one from "
                        f"{distribution!r}; uninstall one of them"
                    )
                found[cls.name] = Info(cast(T, cls), distribution, version)
                provided_by(cls, distribution)
        return found

    @cached_property
    def writers(self) -> dict[str, Callable[..., Any]]:
        """Format -> function (program, path, **options) that writes a program."""
        return self._table("surgery_writers", self._writer_of)

    def _writer_of(self, impl: Any, format: Any, function: Any) -> Callable[..., Any]:
        """The writer of a plugin, which reports what its code raises."""
        distribution, _ = self.distribution_of(impl)
        if distribution == CORE:
            return cast(Callable[..., Any], function)

        def write(*args: Any, **kwargs: Any) -> Any:
            with self._reported(distribution, f"the writer of the format {format!r}"):
                return function(*args, **kwargs)

        return write

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

    @cached_property
    def schemes(self) -> dict[str, Any]:
        """Scheme of references, such as "hf" -> the implementation of `surgery_load_model` that loads them."""
        found: dict[str, Any] = {}
        loaders = {impl.plugin_name: impl for impl in self.implementations("surgery_load_model")}
        for impl in self.implementations("surgery_load_schemes"):
            distribution, _ = self.distribution_of(impl)
            for scheme in self.call(impl):
                other = found.get(scheme)
                if other is None and impl.plugin_name in loaders:
                    found[scheme] = loaders[impl.plugin_name]
                elif other is not None:
                    self.notes.append(
                        f"plugin {distribution!r} does not load {scheme}: references, as "
                        f"{self.distribution_of(other)[0]!r} does"
                    )
        return found

    def _table(self, hook: str, make: Callable[[Any, Any, Any], Any] | None = None) -> dict[Any, Any]:
        """The tables that all plugins return for a hook, merged. What a plugin would replace stays, with a note.

        Args:
            hook: name of the hook.
            make: function (implementation, key, value) -> the value to use.
        """
        merged: dict[Any, Any] = {}
        owners: dict[Any, str] = {}
        for impl in self.implementations(hook):
            distribution, _ = self.distribution_of(impl)
            for key, value in dict(self.call(impl)).items():
                if key in merged:
                    self.notes.append(
                        f"plugin {distribution!r} would replace {key} of {owners[key]!r} ({hook}); that is left out"
                    )
                    continue
                merged[key] = make(impl, key, value) if make is not None else value
                owners[key] = distribution
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
        with self._reported(self.distribution_of(impl)[0], impl.function.__name__):
            return impl.function(*(arguments[name] for name in impl.argnames))

    def first(self, hook: str, **arguments: Any) -> Any:
        """The first result of a hook that is not None; plugins are asked before the built-in implementations.

        Args:
            hook: name of the hook.
            **arguments: arguments of the hook.

        Raises:
            PluginError: an implementation fails; see `call`.
        """
        for impl in reversed(self.implementations(hook)):
            found = self.call(impl, **arguments)
            if found is not None:
                return found
        return None

    @contextmanager
    def _reported(self, distribution: str, hook: str) -> Iterator[None]:
        try:
            yield
        except SurgeryError:
            raise
        except Exception as error:
            # An error of surgery's own code is its own, not a plugin's.
            if distribution == CORE:
                raise
            first = (str(error).splitlines() or [""])[0]
            raise PluginError(
                f"plugin {distribution!r} fails in {hook}: {type(error).__name__}: {first}; uninstall it, or report "
                "it to its author"
            ) from error


def check_classes(given: Any, hook: str, base: type[Configured]) -> None:
    """Raise PluginError if a hook returned anything but a list of classes with names.

    Args:
        given: what the hook returned.
        hook: its name.
        base: class that each must derive from.
    """
    if not isinstance(given, (list, tuple)):
        raise PluginError(f"it returns {given!r} from {hook}; return a list of classes, such as [MyPass]")
    for cls in given:
        if not (isinstance(cls, type) and issubclass(cls, base) and cls.name):
            raise PluginError(f"it registers {cls!r}, which is not a {base._kind} class with a name")


def make_plugin_manager(entry_points: bool = True, plugins: tuple[Any, ...] = ()) -> Plugins:
    """Make a plugin manager with the built-in plugins, installed plugins and given plugins.

    Every plugin is checked: its hooks are marked and known, and return what they should.

    Args:
        entry_points: load the installed entry points of group `surgery`. One that cannot be used is listed in
            `Plugins.broken`, and the others still work.
        plugins: further plugins: modules or objects with hook implementations, paths of Python files, or classes of
            passes and objectives.

    Raises:
        pluggy.PluginValidationError: one of `plugins` implements an unknown hook.
        PluginError: one of `plugins` returns a wrong value from a hook, or lacks the mark of a hook.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hooks)
    found = Plugins(manager)
    checks: dict[str, Check] = {}
    for name in DEFAULT_PLUGINS:
        module = import_module(name)
        manager.register(module, name=name)
        found.distributions[name] = (CORE, _version(CORE))
        checks.update(getattr(module, "CHECKS_OF_HOOKS", {}))
    if entry_points:
        _load_entry_points(found, checks)
    for plugin in map(plugin_of, plugins):
        title = getattr(plugin, "__name__", type(plugin).__name__)
        name = manager.register(plugin) or repr(plugin)
        found.distributions[name] = (title, "")
        try:
            _check(found, plugin, checks)
        except PluginError as error:
            if title in str(error):
                raise
            raise PluginError(f"plugin {title!r}: {error}") from error
    manager.check_pending()
    return found


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _load_entry_points(found: Plugins, checks: Mapping[str, Check]) -> None:
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: p.name):
        distribution = point.dist.name if point.dist else point.name
        title = f"{distribution} ({point.value})"
        plugin = None
        try:
            # Any exception may come from a plugin's import. It must not stop the other plugins.
            plugin = point.load()
            name = f"{distribution}:{point.name}"
            found.distributions[name] = (distribution, _version(distribution))
            found.manager.register(plugin, name=name)
            # Finds misspelt hooks while it is known which plugin has them.
            found.manager.check_pending()
            _check(found, plugin, checks)
        except Exception as error:
            if plugin is not None and found.manager.is_registered(plugin):
                found.manager.unregister(plugin)
            said = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            found.broken[title] = next(iter(said.splitlines()), type(error).__name__)


def _check(found: Plugins, plugin: Any, checks: Mapping[str, Check]) -> None:
    """Check that a registered plugin has hooks, that all of them are marked, and that they return what they should.

    Raises:
        PluginError: a hook is not marked or returns a wrong value, or the plugin has none.
    """
    known = {name for name in vars(hooks) if name.startswith("surgery_")}
    for name in sorted(known & set(dir(plugin))):
        function = getattr(plugin, name)
        own = not str(getattr(function, "__module__", "")).startswith("surgery.")
        if callable(function) and own and not hasattr(function, f"{GROUP}_impl"):
            raise PluginError(f"its {name} is not marked; put @hookimpl (surgery.api) above it")
    callers = found.manager.get_hookcallers(plugin) or []
    if not callers:
        what = f"the {type(plugin).__name__} {getattr(plugin, '__name__', plugin)!r}"
        raise PluginError(
            f"{what} has no hook of surgery; name a module whose functions are marked @hookimpl, such as "
            "surgery_passes"
        )
    for caller in callers:
        check = checks.get(caller.name)
        for impl in caller.get_hookimpls():
            if impl.plugin is plugin and check is not None:
                check(found.call(impl))
