"""Plugin managers: built-ins and entry points through the same hooks, with no global state."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

import pluggy

from surgery import hookspecs
from surgery.configured import Configured
from surgery.errors import PassError, PluginError, SurgeryError, TrainingError, nearest
from surgery.pass_base import Pass
from surgery.training.objective import Objective
from surgery.weight_ops import BUILTIN_WEIGHT_OPS, WeightOp

GROUP = "surgery"
CORE = "torch-surgery"


T = TypeVar("T", bound=type[Configured])


@dataclass(frozen=True)
class Info(Generic[T]):
    """A registered class and the distribution that it comes from."""

    cls: T
    distribution: str
    version: str

    @property
    def name(self) -> str:
        return self.cls.name


PassInfo = Info[type[Pass]]
ObjectiveInfo = Info[type[Objective]]


@dataclass
class Plugins:
    """A plugin manager with its registries. broken: entry point -> why it could not be loaded."""

    manager: pluggy.PluginManager
    distributions: dict[str, tuple[str, str]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def hook(self) -> Any:
        return self.manager.hook

    @cached_property
    def passes(self) -> dict[str, PassInfo]:
        """Passes by name. Raises PluginError where two distributions register one name."""
        return self._named("surgery_passes", Pass, "passes")

    @cached_property
    def objectives(self) -> dict[str, ObjectiveInfo]:
        """Objectives by name. Raises PluginError where two distributions register one name."""
        return self._named("surgery_objectives", Objective, "objectives")

    def _named(self, hook: str, base: T, plural: str) -> dict[str, Info[T]]:
        """The classes that all plugins give for a hook, by name."""
        found: dict[str, Info[T]] = {}
        for impl in self.implementations(hook):
            distribution, version = self.distribution_of(impl)
            for cls in list(self.call(impl)):
                if not (isinstance(cls, type) and issubclass(cls, base) and cls.name):
                    raise PluginError(
                        f"plugin {distribution!r} registers {cls!r}, which is no {base.kind} with a name"
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
    def weight_ops(self) -> dict[Any, WeightOp]:
        return self._table("surgery_weight_ops")

    @cached_property
    def lowerings(self) -> dict[Any, Any]:
        return self._table("surgery_onnx_lowerings")

    def _table(self, hook: str) -> dict[Any, Any]:
        """What all plugins give, a later one's word before an earlier one's."""
        merged: dict[Any, Any] = {}
        for impl in self.implementations(hook):
            merged.update(self.call(impl))
        return merged

    def implementations(self, hook: str) -> list[Any]:
        """A hook's implementations, built-ins first."""
        return list(getattr(self.manager.hook, hook).get_hookimpls())

    def distribution_of(self, impl: Any) -> tuple[str, str]:
        """Name and version of the distribution of a hook implementation."""
        return self.distributions.get(impl.plugin_name, (impl.plugin_name, ""))

    def call(self, impl: Any, **arguments: Any) -> Any:
        """What one implementation returns. Raises PluginError with its distribution where it fails."""
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

    def find_pass(self, name: str, distribution: str = "") -> PassInfo:
        """The pass of that name; PassError with the nearest names, or with the distribution to install."""
        if name in self.passes:
            return self.passes[name]
        for entry_point, why in self.broken.items():
            if distribution and distribution == entry_point.partition(" ")[0]:
                raise PluginError(
                    f"pass {name!r} comes from the plugin {entry_point}, which does not load: {why}"
                )
        if distribution and distribution != CORE:
            raise PassError(
                f"pass {name!r} comes from the plugin {distribution!r}; pip install {distribution}"
            )
        hint = nearest(name, self.passes) or f"; there are {', '.join(sorted(self.passes))}"
        raise PassError(f"there is no pass {name!r}{hint}")

    def find_objective(self, name: str) -> ObjectiveInfo:
        """The objective of that name, or of that other name; TrainingError with the nearest names."""
        if name not in self.objectives:
            known = next((info for info in self.objectives.values() if name in info.cls.aliases), None)
            if known is not None:
                return known
            hint = nearest(name, self.objectives) or f"; there are {', '.join(sorted(self.objectives))}"
            raise TrainingError(f"there is no objective {name!r}{hint}")
        return self.objectives[name]


class _Builtins:
    @hookspecs.hookimpl
    def surgery_weight_ops(self) -> dict[Any, Any]:
        return BUILTIN_WEIGHT_OPS

    @hookspecs.hookimpl
    def surgery_onnx_lowerings(self) -> dict[Any, Any]:
        import torch

        from surgery.export import attention, conv3d, integers, quantized
        from surgery.quantizing import dequantize, round_activation

        return {
            dequantize._opoverload: quantized.translation(),
            round_activation._opoverload: integers.translation(),
            torch.ops.aten.conv3d.default: conv3d.translation(),
            torch.ops.aten.scaled_dot_product_attention.default: attention.translation(),
        }


def make_plugin_manager(entry_points: bool = True, plugins: tuple[Any, ...] = ()) -> Plugins:
    """A manager with the built-ins, the installed entry points of group `surgery` and the given plugins.

    Entry points load one at a time: a broken one is remembered in `broken`, and the rest work.
    """
    from surgery import passes
    from surgery.capture import loaders
    from surgery.training import objectives

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    found = Plugins(manager)
    for plugin, name in (
        (_Builtins(), "surgery.builtins"),
        (passes, "surgery.passes"),
        (objectives, "surgery.objectives"),
        (loaders, "surgery.loaders"),
    ):
        manager.register(plugin, name=name)
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
            plugin = point.load()
            name = found.manager.register(plugin, name=f"{distribution}:{point.name}")
            found.manager.check_pending()
            found.distributions[name or point.name] = (distribution, _version(distribution))
        except Exception as error:
            if plugin is not None and found.manager.is_registered(plugin):
                found.manager.unregister(plugin)
            found.broken[title] = f"{type(error).__name__}: {error}".splitlines()[0]
