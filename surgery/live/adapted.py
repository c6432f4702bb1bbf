"""Classes of rewritten layers: compiled forwards, pickling, and the change to another dtype."""

from __future__ import annotations

import importlib
import inspect
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from surgery.capture.devices import device_of
from surgery.common.errors import PassError
from surgery.engine.recompute import REMADE, recomputed
from surgery.graph.compiled import check_targets

_serial = count()
Forward = Callable[..., Any]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Source:
    """Python source of a rewritten forward, from which it can be compiled in another process.

    Attributes:
        title: Name of the layer's class, for tracebacks.
        text: The source.
        names: Global names that it reads; modules are stored by name, since they cannot be pickled.
        remade: True if weights are computed from codes, and recomputed in the backward pass.
    """

    title: str
    text: str
    names: Mapping[str, Any]
    remade: bool

    @staticmethod
    def of(graph: fx.Graph, title: str) -> Source:
        """The source of a graph, as a method that reads its tensors as attributes of self."""
        check_targets(graph)
        code = graph.python_code("self")
        names = {
            name: _Module(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in code.globals.items()
        }
        return Source(title, code.src, names, any(node.target in REMADE for node in graph.nodes))

    def compile(self) -> Forward:
        """The compiled forward."""
        where = f"<surgery {self.title} {next(_serial)}>"
        # Registered with linecache, so that tracebacks and debuggers show the generated source.
        linecache.cache[where] = (len(self.text), None, self.text.splitlines(keepends=True), where)
        space: dict[str, Any] = {n: v.load() if isinstance(v, _Module) else v for n, v in self.names.items()}
        exec(compile(self.text, where, "exec"), space)
        return recomputed(space["forward"]) if self.remade else space["forward"]


@dataclass(frozen=True)
class _Module:
    name: str

    def load(self) -> ModuleType:
        return importlib.import_module(self.name)


@dataclass(eq=False)
class Code:
    """Description of the class of a rewritten layer. It is pickled in place of the class.

    Attributes:
        base: The layer's own class.
        sources: Forwards, by mode and number of dimensions of the input.
        entries: Ids of the entries that act in the layer.
        modules: Modules that define the ops and passes that the forwards use.
        dtypes: Dtypes of the layer's own floating-point tensors that the forwards were traced for.
        again: Function (layer) -> class of the layer for the dtypes and the device that it has now.
        device: Device that the forwards create tensors on; None if they create none.
    """

    base: type[nn.Module]
    sources: Mapping[tuple[bool, int], Source]
    entries: tuple[str, ...]
    modules: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]
    again: Callable[[nn.Module], type[nn.Module]]
    device: torch.device | None = None
    _made: list[type[nn.Module]] = field(default_factory=list)

    def cls(self) -> type[nn.Module]:
        """The class; it is created once."""
        if not self._made:
            for name in self.modules:
                importlib.import_module(name)
            self._made.append(_subclass(self))
        return self._made[0]

    def __deepcopy__(self, memo: Any) -> Code:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": []}


def _subclass(code: Code) -> type[nn.Module]:
    """A subclass of a layer's class with the compiled forwards."""
    cls, entries = code.base, code.entries
    table = {key: source.compile() for key, source in code.sources.items()}

    def forward(self: Any, input: Tensor) -> Any:
        try:
            chosen = table[self.training, input.dim()]
        except KeyError:
            raise PassError(
                f"{', '.join(entries)}: this {cls.__name__} is adapted for inputs of "
                f"{' or '.join(str(r) for r in sorted({rank for _, rank in table}))} dimensions, but got one of "
                f"{input.dim()}; apply the pass with example inputs that reach the layer in this shape"
            ) from None
        return chosen(self, input)

    parameter = [*inspect.signature(cls.forward).parameters][1]
    if parameter != "input":
        forward = _renamed(forward, parameter)
    made = derived(cls, forward)
    made.surgery_code = code  # type: ignore[attr-defined]
    return made


def derived(cls: type[nn.Module], forward: Forward) -> type[nn.Module]:
    """A subclass with another forward and the same name; its attribute `surgery_base` is the original class."""
    kept = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"forward": forward, "surgery_base": cls, "__reduce_ex__": _reduced, "_apply": _converted}
    return type(cls.__name__, (cls,), {**kept, **own})


def _renamed(forward: Forward, parameter: str) -> Forward:
    """The forward with its argument renamed to the layer's own name, since callers may pass it by keyword."""
    space: dict[str, Any] = {"inner": forward}
    exec(f"def forward(self, {parameter}): return inner(self, {parameter})", space)
    return space["forward"]


def acting(layer: nn.Module) -> type[nn.Module]:
    """The class that acts in a layer: its own, or the one that a block in this thread has chosen."""
    cls = type(layer)
    chosen = getattr(cls, "surgery_chosen", None)
    return cls if chosen is None else chosen(layer)


def _reduced(self: Any, protocol: Any) -> Any:
    """Pickle or copy a rewritten layer: the class was created at run time, so a description stands for it."""
    made = self.surgery_base.__reduce_ex__(self, protocol)
    cls = acting(self)
    # A class that chooses by row cannot be described; the copy gets the class outside of the block.
    if hasattr(cls, "surgery_base") and not hasattr(cls, "surgery_code"):
        cls = getattr(type(self), "surgery_outer", cls)
    code = getattr(cls, "surgery_code", None)
    if code is None:
        return (_blank, (getattr(cls, "surgery_base", cls),), *made[2:])
    return (restored, (code,), *made[2:])


def _blank(cls: type[M]) -> M:
    return cls.__new__(cls)


def restored(code: Code) -> nn.Module:
    """A layer of the class that a description stands for, without its attributes."""
    cls = code.cls()
    return cls.__new__(cls)


def _converted(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply a function to all tensors, as `to` and `half` do. The forwards follow to another dtype or device."""
    result = self.surgery_base._apply(self, *args, **kwargs)
    outer = getattr(type(self), "surgery_outer", type(self))
    code: Code | None = getattr(outer, "surgery_code", None)
    if code is not None and (
        float_dtypes(self, code.dtypes) != code.dtypes or code.device not in (None, device_of(self))
    ):
        if outer is not type(self):
            raise PassError("a model cannot be converted inside a `using` block; do it outside of the block")
        self.__class__ = code.again(self)
    return result


def float_dtypes(layer: nn.Module, names: Sequence[str] | Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Dtypes of a layer's floating-point tensors.

    Args:
        layer: The layer.
        names: Names of the tensors.
    """
    found = {**layer._parameters, **layer._buffers}
    return {n: t.dtype for n in names if (t := found.get(n)) is not None and t.is_floating_point()}
