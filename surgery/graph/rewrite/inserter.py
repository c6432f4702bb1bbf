"""Inserts nodes into a graph for one pass; each gets a fake value, a module stack and its provenance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from surgery.common.errors import PassError
from surgery.graph.fake import MetaCache
from surgery.graph.marks import META, Mark, mark_of, set_mark
from surgery.graph.ops import Call
from surgery.graph.outputs import add_output, follow
from surgery.graph.rewrite.traced import ops_of, replay
from surgery.graph.sites import Site

if TYPE_CHECKING:
    from surgery.graph.view import View


def _module_stack(node: fx.Node) -> dict[Any, Any]:
    return dict(node.meta.get("nn_module_stack", {}))


class Inserter:
    """Inserts nodes for one pass, in front of the anchor at the current call of a site.

    `g["A"]` is the graph value of the pass's tensor A at this site, and `g.call` inserts an op.

    Attributes:
        graph: The graph that is edited.
        weight: Scale of what the adapter adds: 1 as trained, 0 as if absent.
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
        """Prepare edits of one graph by one journal entry.

        Args:
            graph: The graph to edit.
            cache: Fake results of ops.
            entry_id: Id of the entry, for provenance and messages.
            names: Tensor of the pass -> its name in the program.
            tensors: Tensors of the program, by name.
            weight: Scale of what the adapter adds.
            view: Analysis of the graph as it was before this pass.
        """
        self.graph = graph
        self.weight = weight
        self._view = view
        self._cache = cache
        self._entry_id = entry_id
        self._names = names
        self._tensors = tensors
        self._attributes: dict[str, fx.Node] = {}
        self._first = next(iter(graph.nodes))
        self._new: dict[fx.Node, None] = {}
        self._anchor = self._first
        self._like: fx.Node | None = None
        self._site: Site | None = None
        self._call: Call | None = None
        self._last_mark: tuple[tuple[str, str | None], Mark] = (("", None), Mark())

    @property
    def view(self) -> View:
        """The analysis of the graph as it was before this pass."""
        assert self._view is not None
        return self._view

    @property
    def training(self) -> bool:
        """True in the graph of train mode."""
        return self._view is not None and self._view.training

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The pass's own tensors at this site, by their names in the pass."""
        return {name: self._tensors[full] for name, full in self._names.items()}

    @property
    def cache(self) -> MetaCache:
        """Fake results of ops, shared by all edits of the graph."""
        return self._cache

    @property
    def site(self) -> Site:
        """The site that is being rewritten."""
        if self._site is None:
            raise RuntimeError(f"{self._entry_id}: the rewriter is at no site; use it inside `rewrite`")
        return self._site

    @property
    def site_call(self) -> Call:
        """The call of the site that is being rewritten."""
        if self._call is None:
            raise RuntimeError(f"{self._entry_id}: the rewriter is at no call; use it inside `rewrite`")
        return self._call

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
        """Insert a new graph value of a tensor of the base.

        Args:
            name: Name of the tensor.
        """
        # A graph may read a tied tensor under another name than the journal recorded.
        names = self.view.names.get(name, (name,))
        known = next(n for n in self.graph.nodes if n.op == "get_attr" and n.target in names)
        with self.graph.inserting_before(self._first):
            node = self.graph.create_node("get_attr", known.target)
        node.meta = {"val": known.meta["val"], META: self._provenance()}
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert `op(*args, **kwargs)` and return its value.

        Args:
            op: An ATen op or another function.
            args: Positional arguments; they can be graph values.
            kwargs: Keyword arguments; they can be graph values.
        """
        with self.graph.inserting_before(self._anchor):
            node = self.graph.create_node("call_function", op, name=getattr(op, "__name__", None))
        # create_node would search the arguments for raw symbols, which takes longer than everything else here.
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        own = self.site_call.node
        like = self._like or own
        node.meta.update(
            {
                "val": self._cache.call(op, args, kwargs),
                # torch.export.unflatten needs the ops of one module call side by side.
                "nn_module_stack": _module_stack(like) or dict([*_module_stack(own).items()][:1]),
                "stack_trace": like.meta.get("stack_trace", ""),
                META: self._provenance(own.name),
                "custom": self._custom(),
            }
        )
        self._new[node] = None
        return node

    def trace(self, function: Callable[..., torch.Tensor], *args: Any) -> fx.Node:
        """Insert the ops that a function of tensors computes, written in torch.

        The function is called with fake tensors, whose dynamic sizes are symbols, so it cannot read values; the tensors
        that it needs are arguments. A function without a closure is traced once for all sites of one shape.

        Example:
            >>> g.trace(reflect, g.x, g["u"], g.weight)

        Args:
            function: Function of the arguments that returns one tensor.
            args: Graph values, and numbers.

        Raises:
            PassError: The function cannot be traced, creates a tensor, or returns something else than a tensor.
        """
        nodes = (arg for arg in args if isinstance(arg, fx.Node))
        return replay(ops_of(self._cache, function, args), nodes, self.call)

    def model_op(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert an op that counts as the model's own: later passes match it, and analysis reads roles through it.

        Args:
            op: An ATen op or another function.
            args: Positional arguments, as in `call`.
            kwargs: Keyword arguments, as in `call`.
        """
        node = self.call(op, *args, **kwargs)
        set_mark(node, aux=False)
        return node

    def copy(self, node: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Insert a copy of a node of the model that reads mapping[n] instead of n; later passes match it too."""
        with self.graph.inserting_before(self._anchor):
            fresh = self.graph.node_copy(node, lambda n: mapping.get(n, n))
        mark = replace(self._provenance(self.site_call.node.name), aux=False)
        fresh.meta = {**node.meta, META: mark, "custom": self._custom()}
        self._new[fresh] = None
        return fresh

    @contextlib.contextmanager
    def before(self, node: fx.Node, like: fx.Node | None = None) -> Iterator[None]:
        """Context manager: insert before a node.

        Args:
            node: The node to insert before.
            like: A node of the module that inserted nodes belong to; `node` by default.
        """
        kept = self._anchor, self._like
        self._anchor, self._like = node, like or node
        try:
            yield
        finally:
            self._anchor, self._like = kept

    def after(self, node: fx.Node) -> contextlib.AbstractContextManager[None]:
        """Context manager: insert after a node; for an input or parameter, after all inputs and parameters."""
        following = node.next
        while node.op in ("placeholder", "get_attr") and following.op in ("placeholder", "get_attr"):
            following = following.next
        return self.before(following, node)

    def once(self, key: str, build: Callable[[], fx.Node], stack: Mapping[str, Any] | None = None) -> fx.Node:
        """A value that is inserted once for the whole application of the pass: the first place makes it.

        Args:
            key: Name of the value within the application. For a value of one site, make `site.key` part of it; paths
                of sites can repeat.
            build: Function that inserts the value and returns it.
            stack: The `nn_module_stack` of the inserted nodes, if they do not belong to the site's module.
        """
        for node in self.graph.nodes:
            mark = mark_of(node)
            if mark.once == key and mark.entry == self._entry_id:
                return node
        known = set(self._new)
        node = build()
        set_mark(node, once=key)
        if stack is not None:
            for new in self._new:
                if new not in known:
                    new.meta["nn_module_stack"] = dict(stack)
        return node

    def set_role(self, node: fx.Node, role: str) -> None:
        """Record the role of an op inserted with `model_op`, if later analysis cannot derive it."""
        set_mark(node, role=role)

    def add_output(self, name: str, node: fx.Node) -> None:
        """Let the program return an additional value; see surgery.graph.outputs.add_output."""
        set_mark(node, output=name)
        add_output(self.graph, name, node)

    def follow(self, changed: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """New fake values of the nodes after nodes of another width; see surgery.graph.outputs.follow."""
        return follow(self.graph, changed, self._cache)

    def refresh(self, vals: Mapping[fx.Node, Any]) -> None:
        """Give nodes new `val`s, such as those that `follow` returned."""
        for node, val in vals.items():
            node.meta = {**node.meta, "val": val}

    def _custom(self) -> dict[str, Any]:
        """Provenance in the form that torch.export preserves, so that an ONNX file has it too."""
        name, _, label = self._entry_id.partition(":")
        return {"surgery": {"pass": name, "name": label or "default", "site": self.site.path}}

    def _provenance(self, call: str | None = None) -> Mark:
        """The mark of a node that an adapter inserts, for a call of its site; nodes of one call share it."""
        key = self.site.path, call
        if self._last_mark[0] != key:
            self._last_mark = key, Mark(entry=self._entry_id, site=key[0], aux=True, call=call)
        return self._last_mark[1]
