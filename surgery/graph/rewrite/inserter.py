"""Inserting nodes into a graph, each with its `val`, `nn_module_stack` and provenance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from surgery.common.errors import PassError
from surgery.graph.fake import MetaCache
from surgery.graph.marks import META
from surgery.graph.ops import Call
from surgery.graph.outputs import add_output, follow
from surgery.graph.sites import Site

if TYPE_CHECKING:
    from surgery.graph.view import View


def _module_stack(node: fx.Node) -> dict[Any, Any]:
    return dict(node.meta.get("nn_module_stack", {}))


class Inserter:
    """Inserts nodes for one pass, at the anchor of the site's call where it stands.

    `g["A"]` is the graph value of the pass's tensor A at this site; `g.call` inserts an op. `view` is the analysis of
    the graph as it was before this pass; `training` says whether it was traced in train mode. `weight` scales what an
    adapter adds (1 as trained, 0 as absent).
    """

    def __init__(
        self,
        graph: fx.Graph,
        cache: MetaCache,
        entry_id: str,
        names: Mapping[str, str],
        tensors: Mapping[str, torch.Tensor],
        weight: float = 1.0,
        view: View | None = None,
    ) -> None:
        self.graph = graph
        self.weight = weight
        self._view = view
        self._cache = cache
        self._entry_id = entry_id
        self._names = names  # tensor of the pass -> its name in the program
        self._tensors = tensors
        self._attributes: dict[str, fx.Node] = {}
        self._first = next(iter(graph.nodes))
        self._new: dict[fx.Node, None] = {}
        self._anchor = self._first
        self._like: fx.Node | None = None
        self.site: Site | None = None
        self.call_: Call | None = None

    @property
    def view(self) -> View:
        assert self._view is not None
        return self._view

    @property
    def training(self) -> bool:
        """Whether this is the graph of train mode."""
        return self._view is not None and self._view.training

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The pass's own tensors at this site, by their names in the pass."""
        return {name: self._tensors[full] for name, full in self._names.items()}

    @property
    def cache(self) -> MetaCache:
        return self._cache

    def __getitem__(self, name: str) -> fx.Node:
        if name not in self._attributes:
            self._attributes[name] = self._attribute(name)
        return self._attributes[name]

    def _attribute(self, name: str) -> fx.Node:
        if name not in self._names:
            raise PassError(f"{self._entry_id}: the pass declares no tensor {name!r}")
        full = self._names[name]
        with self.graph.inserting_before(self._first):
            node = self.graph.create_node("get_attr", full, name=full.replace(".", "_"))
        node.meta = {"val": self._cache.tensor(self._tensors[full]), META: self._provenance()}
        return node

    def get(self, name: str) -> fx.Node:
        """A fresh graph value of a tensor of the base, by its name."""
        names = self.view.names.get(
            name, (name,)
        )  # of a tied one, a graph may read another than was recorded
        known = next(n for n in self.graph.nodes if n.op == "get_attr" and n.target in names)
        with self.graph.inserting_before(self._first):
            node = self.graph.create_node("get_attr", known.target)
        node.meta = {"val": known.meta["val"], META: self._provenance()}
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert `op(*args, **kwargs)`; arguments may be graph values."""
        with self.graph.inserting_before(self._anchor):
            node = self.graph.create_node("call_function", op, name=getattr(op, "__name__", None))
        # Given to create_node, arguments are searched for raw symbols, which takes longer than all the rest.
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        assert self.call_ is not None
        like = self._like or self.call_.node
        node.meta.update(
            {
                "val": self._cache.call(op, args, kwargs),
                # torch.export.unflatten wants the ops of a module's call side by side.
                "nn_module_stack": _module_stack(like) or dict([*_module_stack(self.call_.node).items()][:1]),
                "stack_trace": like.meta.get("stack_trace", ""),
                META: {**self._provenance(), "call": self.call_.node.name},
                "custom": self._custom(),
            }
        )
        self._new[node] = None
        return node

    def model_op(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """As `call`, for an op of the model's kind: later passes match it, and roles are read through it."""
        node = self.call(op, *args, **kwargs)
        node.meta[META] = {**node.meta[META], "aux": False}
        return node

    def copy(self, node: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Insert a copy of a node of the model that reads mapping[n] for n; later passes match it like the model's."""
        assert self.call_ is not None
        with self.graph.inserting_before(self._anchor):
            fresh = self.graph.node_copy(node, lambda n: mapping.get(n, n))
        mark = {**self._provenance(), "call": self.call_.node.name, "aux": False}
        fresh.meta = {**node.meta, META: mark, "custom": self._custom()}
        self._new[fresh] = None
        return fresh

    @contextlib.contextmanager
    def before(self, node: fx.Node, like: fx.Node | None = None) -> Iterator[None]:
        """Insert what the block calls before a node, as part of the module that `like` (or it) belongs to."""
        kept = self._anchor, self._like
        self._anchor, self._like = node, like or node
        try:
            yield
        finally:
            self._anchor, self._like = kept

    def after(self, node: fx.Node) -> contextlib.AbstractContextManager[None]:
        """Insert what the block calls after a node (and after the inputs, for one of these)."""
        following = node.next
        while node.op in ("placeholder", "get_attr") and following.op in ("placeholder", "get_attr"):
            following = following.next
        return self.before(following, node)

    def once(self, key: str, build: Callable[[], fx.Node], stack: Mapping[str, Any] | None = None) -> fx.Node:
        """What build inserts, made at one place of this pass and found again at the others.

        stack: the `nn_module_stack` of where it is made, where that is not in the site's module.
        """
        for node in self.graph.nodes:
            mark = node.meta.get(META, {})
            if mark.get("once") == key and mark.get("entry") == self._entry_id:
                return node
        known = set(self._new)
        node = build()
        node.meta[META] = {**node.meta[META], "once": key}
        if stack is not None:
            for new in self._new:
                if new not in known:
                    new.meta["nn_module_stack"] = dict(stack)
        return node

    def has_role(self, node: fx.Node, role: str) -> None:
        """Say which role an op of the model's kind has, where that is lost in what follows (parts put together)."""
        node.meta[META] = {**node.meta[META], "role": role}

    def add_output(self, name: str, node: fx.Node) -> None:
        """Let the program return one value more; see surgery.graph.outputs.add_output."""
        node.meta[META] = {**node.meta[META], "output": name}
        add_output(self.graph, name, node)

    def follow(self, changed: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """See surgery.graph.outputs.follow."""
        return follow(self.graph, changed, self._cache)

    def refresh(self, vals: Mapping[fx.Node, Any]) -> None:
        """Give nodes other `val`s: those behind a value of another width (see surgery.graph.outputs.follow)."""
        for node, val in vals.items():
            node.meta = {**node.meta, "val": val}

    def _custom(self) -> dict[str, Any]:
        """What torch.export carries through a re-export, and so into ONNX."""
        assert self.site is not None
        name, _, label = self._entry_id.partition(":")
        return {"surgery": {"pass": name, "name": label or "default", "site": self.site.path}}

    def _provenance(self) -> dict[str, Any]:
        assert self.site is not None
        return {"entry": self._entry_id, "site": self.site.path, "aux": True}
