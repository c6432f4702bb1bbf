"""Views of a live model for one thread or asyncio task: the adapters that `using` or `mixed_batch` chose there.

Inside a block, the rewritten layers look up the block of the running context (contextvars). Other threads and tasks
compute with the model as it is outside of the block.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.common.errors import PassError
from surgery.engine.program import Program
from surgery.live.adapted import Forward, derived


@dataclass(frozen=True, eq=False)
class View:
    """A block's choice of adapters.

    Attributes:
        block: Name of the function that opened the block.
        program: The program inside the block.
        classes: Path of a layer -> its class inside the block, for every layer that is rewritten inside or outside.
        alone: True if the block also changes values in the model, so that no other thread can use the model.
        outer: The view of the enclosing block.
    """

    block: str
    program: Program
    classes: Mapping[str, type[nn.Module]]
    alone: bool = False
    outer: View | None = None

    @property
    def chain(self) -> tuple[View, ...]:
        """This view and those of the enclosing blocks."""
        return (self, *(self.outer.chain if self.outer else ()))


# id of a switch -> view of the running context. Contexts share the mapping, so it is replaced and never changed.
_chosen: ContextVar[Mapping[int, View]] = ContextVar("surgery_views")


class Switch:
    """The open blocks of one live model, over all threads."""

    def __init__(self) -> None:
        self.open: list[View] = []
        self._lock = threading.RLock()
        # Path of a layer -> its class outside of blocks, and inside.
        self._classes: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {}

    @property
    def view(self) -> View | None:
        """The view of the running context; None outside of blocks."""
        return _chosen.get({}).get(id(self))

    def free(self) -> None:
        """Raise PassError while a block is open, since the end of the block would revert a change."""
        if self.open:
            raise PassError(
                f"inside a `{self.open[-1].block}` block (of this or another thread) the model cannot be changed, "
                f"because the end of the block would revert it; do this outside of the block"
            )

    @contextlib.contextmanager
    def showing(self, model: nn.Module, view: View) -> Iterator[None]:
        """Context manager: the running context uses a view, whose `outer` is the view so far.

        Args:
            model: The live module.
            view: The view.

        Raises:
            PassError: A block is open in another thread or task, and one of the two changes values in the model.
        """
        with self._lock:
            others = [each for each in self.open if each not in view.chain]
            if others and (view.alone or any(each.alone for each in others)):
                raise PassError(
                    f"{view.block}: another thread or task is inside a `{others[-1].block}` block, and one of the two "
                    "changes values in the model (merged weights, trained parameters or running statistics of the "
                    "base); use a copy of the model for each thread"
                )
            self.open.append(view)
            self._enter(model, view)
            guard = model.register_forward_pre_hook(self._refuse_others) if view.alone else None
        token = _chosen.set({**_chosen.get({}), id(self): view})
        try:
            yield
        finally:
            _chosen.reset(token)
            with self._lock:
                if guard is not None:
                    guard.remove()
                self.open.remove(view)
                self._restore(model)

    def _enter(self, model: nn.Module, view: View) -> None:
        for path in view.classes:
            if path not in self._classes:
                layer = model.get_submodule(path)
                self._classes[path] = type(layer), self._switched(type(layer), path)
                layer.__class__ = self._classes[path][1]

    def _restore(self, model: nn.Module) -> None:
        """Give layers the classes that they have outside of blocks, or inside while others are open."""
        for path, pair in self._classes.items():
            model.get_submodule(path).__class__ = pair[bool(self.open)]
        if not self.open:
            self._classes = {}

    def _refuse_others(self, module: nn.Module, args: Any) -> None:
        """Hook: raise PassError in a thread or task outside of the block."""
        if self._current(module) is None:
            raise PassError(
                f"another thread or task is inside a `{self.open[-1].block}` block that changes values in the model; "
                "use a copy of the model for each thread"
            )

    def _current(self, module: nn.Module) -> View | None:
        """The view that a call of a module uses."""
        view = self.view
        if view is not None or not self.open:
            return view
        # Threads of autograd (recomputing a checkpoint) and of DataParallel have no context. They work for the block.
        helper = isinstance(threading.current_thread(), threading._DummyThread)
        return self.open[-1] if helper or getattr(module, "_is_replica", False) else None

    def _switched(self, cls: type[nn.Module], path: str) -> type[nn.Module]:
        """A class of a layer that looks up the class of the running context in every call."""
        base: type[nn.Module] = getattr(cls, "surgery_base", cls)

        def chosen(layer: nn.Module) -> type[nn.Module]:
            view = self._current(layer)
            return cls if view is None else view.classes.get(path, base)

        # torch.compile cannot trace the look-up, so it compiles the chosen forwards one by one.
        @torch.compiler.disable(recursive=False)
        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            call: Forward = chosen(layer).forward
            return call(layer, *args, **kwargs)

        made: Any = derived(base, forward)
        made.surgery_chosen, made.surgery_outer = staticmethod(chosen), cls
        return made
