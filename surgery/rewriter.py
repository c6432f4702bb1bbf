"""The one thing that changes a graph. It fills `val`, `nn_module_stack` and provenance of every new node."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from surgery.errors import PassError
from surgery.sites import META, Site, head, tail
from surgery.weight_ops import Call, arguments, operand, parameter_of

if TYPE_CHECKING:
    from surgery.view import View

aten = torch.ops.aten


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with its own nodes; metadata dictionaries are copied one level deep."""
    fresh = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = fresh.graph_copy(graph, mapping)
    source = next(node for node in reversed(graph.nodes) if node.op == "output")
    output = fresh.output(result)
    output.meta = copy.copy(source.meta)
    fresh._codegen = copy.copy(graph._codegen)
    return fresh


class MetaCache:
    """Fake results by (op, shapes, dtypes, constants): a pass inserts the same few ops hundreds of times."""

    def __init__(self, graph: fx.Graph) -> None:
        self.mode = next(
            (n.meta["val"].fake_mode for n in graph.nodes if isinstance(n.meta.get("val"), FakeTensor)), None
        ) or FakeTensorMode(allow_non_fake_inputs=True)
        self._results: dict[Any, Any] = {}
        self._alike: dict[Any, int] = {}
        self._numbers: dict[int, tuple[int, Any]] = {}

    def tensor(self, like: torch.Tensor) -> FakeTensor:
        key = ("tensor", tuple(like.shape), like.dtype, like.device)
        if key not in self._results:
            with self.mode:
                self._results[key] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return self._results[key]

    def call(self, op: Any, args: Any, kwargs: Any) -> Any:
        key = (op, self._key(args), *((name, self._key(value)) for name, value in kwargs.items()))
        if key not in self._results:
            values = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
            with self.mode, torch.no_grad():
                self._results[key] = op(*values[0], **values[1])
        return self._results[key]

    def _key(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "n", self._number(value.meta["val"])
        if isinstance(value, (tuple, list)):
            return tuple(self._key(item) for item in value)
        return type(value).__name__, value

    def _number(self, val: Any) -> int:
        """The same number for results that are alike; each is looked at once (symbols are slow to compare)."""
        known = self._numbers.get(id(val))
        if known is None:
            number = self._alike.setdefault(_freeze(val), len(self._alike))
            known = self._numbers[id(val)] = (number, val)  # held, so that its id stays its own
        return known[0]


def _freeze(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ("t", tuple(_freeze(s) for s in value.shape), value.dtype)
    if isinstance(value, torch.SymInt):
        return ("s", value.node.expr)
    if isinstance(value, (tuple, list)):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _freeze(item)) for key, item in value.items())
    return (type(value).__name__, value)


class Rewriter:
    """Inserts nodes for one pass at one call of a site.

    `x` is the activation that enters the op, `out` the value that its users see now (earlier adapters
    included). `g["A"]` is the graph value of the pass's tensor A at this site; `g.call` inserts an op.
    `weight` scales what an adapter adds (1 as trained, 0 as absent). `view` is the analysis of the graph as it
    was before this pass; `view.training` says whether it was traced in train mode.
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
        self._swapped: dict[fx.Node, fx.Node] = {}
        self._cache = cache
        self._entry_id = entry_id
        self._names = names  # tensor of the pass -> its name in the program
        self._tensors = tensors
        self._attributes: dict[str, fx.Node] = {}
        self._first = next(iter(graph.nodes))
        self._new: dict[fx.Node, None] = {}
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

    def rewrite_once(self, site: Site, build: Any) -> None:
        """Call build(site, self) once for a place of the whole program; it puts values in place with `wrap`."""
        self.site, self._attributes, self._new = site, {}, {}
        self.call_ = site.calls[0]
        self.x, self.out = head(operand(self.call_)), tail(self.call_.node)
        self._anchor = self.out.next
        build(site, self)

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert what the block calls before a node."""
        anchor, self._anchor = self._anchor, node
        try:
            yield
        finally:
            self._anchor = anchor

    def after(self, node: fx.Node) -> contextlib.AbstractContextManager[None]:
        """Insert what the block calls after a node (and after the inputs, for one of these)."""
        following = node.next
        while node.op in ("placeholder", "get_attr") and following.op in ("placeholder", "get_attr"):
            following = following.next
        return self.before(following)

    def wrap(self, node: fx.Node, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Put build(value) in the place of a node's value, which is that of the last adapter round it.

        build inserts with `call`, after that value. Its users see the new value, what build inserted sees the old.
        """
        value = tail(node)
        known = set(self._new)
        with self.after(value):
            fresh = build(value)
        if fresh is value:
            return value
        own = {n for n in self._new if n not in known}
        self._put(value, fresh, lambda user: user not in own)
        return fresh

    def _put(self, value: fx.Node, fresh: fx.Node, moves: Callable[[fx.Node], bool]) -> None:
        assert self.site is not None
        # Before the swap: `wraps` names the inner value, so that a later pass finds the outermost.
        fresh.meta[META] = {**fresh.meta[META], "wraps": value.name}
        if fresh not in value.users:
            value.meta[META] = {**value.meta.get(META, {}), "wrapped_by": fresh.name}
        value.replace_all_uses_with(fresh, delete_user_cb=moves)

    def swap_weight(self, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Let the site's calls read build(weight) in the place of their weight, as stored; made once for a site.

        build returns a graph value of the weight's shape: inserted with `call`, or one of `g[...]`. For the
        sites' index and later passes it stands for the parameter. Returns the value.
        """
        assert self.call_ is not None
        assert self.site is not None
        call = self.call_
        if call.weight is None:
            raise PassError(f"{self._entry_id} at {self.site.path}: its weight is computed, not stored")
        source = call.weight
        readers = _weight_readers(call)
        first = min(readers)
        current = next(n for n in first.all_input_nodes if n in _standing_for(source))
        if current not in self._swapped:
            with self.before(first):
                value = build(current)
            value.meta[META] = {
                **value.meta[META],
                "weight_of": parameter_of(current) or str(source.target),
                "wraps": current.name,
                "call": call.node.name,
            }
            self._swapped[current] = value
        for reader in readers:
            reader.replace_input_with(current, self._swapped[current])
        return self._swapped[current]

    def rewrite(self, site: Site, build: Any) -> None:
        """Call build(site, self) at every call of the site and put what it returns in the output's place."""
        self.site, self._attributes = site, {}
        for call in site.calls:
            self.call_ = call
            # Read now, not from the call: a site before this one may have been rewritten since it was indexed.
            self.x, self.out = head(operand(call)), tail(call.node)
            self._anchor = self.out.next
            self._new = {}
            value = build(site, self)
            if value is None or value is self.out:
                continue
            if not isinstance(value, fx.Node):
                raise PassError(
                    f"{self._entry_id} at {site.path}: rewrite must return a graph value, got {value!r}"
                )
            self._put(self.out, value, lambda node: node not in self._new)

    def replace_input(self, build: Callable[[fx.Node], fx.Node]) -> None:
        """Let all that stands at this site, op and earlier adapters, read build(x) in the place of x.

        build inserts all that it needs with `call`; from what it returns, first arguments must lead back to x.
        Later adapters still read x itself, so that folding in journal order is right.
        """
        assert self.call_ is not None
        name = self.call_.node.name
        readers = [
            n for n in self.x.users if n is self.call_.node or n.meta.get(META, {}).get("call") == name
        ]
        anchor, self._anchor = self._anchor, min(readers)
        known = set(self._new)
        value = build(self.x)
        self._anchor = anchor
        for node in self._new:
            if node not in known:
                node.meta[META] = {**node.meta[META], "input": True}
        for reader in readers:
            reader.replace_input_with(self.x, value)

    def __getitem__(self, name: str) -> fx.Node:
        if name not in self._attributes:
            if name not in self._names:
                raise PassError(f"{self._entry_id}: the pass declares no tensor {name!r}")
            full = self._names[name]
            with self.graph.inserting_before(self._first):
                node = self.graph.create_node("get_attr", full, name=full.replace(".", "_"))
            node.meta = {"val": self._cache.tensor(self._tensors[full]), META: self._provenance()}
            self._attributes[name] = node
        return self._attributes[name]

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert `op(*args, **kwargs)`; arguments may be graph values."""
        with self.graph.inserting_before(self._anchor):
            node = self.graph.create_node("call_function", op, name=getattr(op, "__name__", None))
        # Given to create_node, arguments are searched for raw symbols, which takes longer than all the rest.
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        assert self.call_ is not None
        node.meta.update(
            {
                "val": self._cache.call(op, args, kwargs),
                "nn_module_stack": dict(self.call_.node.meta.get("nn_module_stack", {})),
                "stack_trace": self.call_.node.meta.get("stack_trace", ""),
                META: {**self._provenance(), "call": self.call_.node.name},
                "custom": self._custom(),
            }
        )
        self._new[node] = None
        return node

    def get(self, name: str) -> fx.Node:
        """A fresh graph value of a tensor of the base, by its name."""
        value = next(n for n in self.graph.nodes if n.op == "get_attr" and n.target == name).meta["val"]
        with self.graph.inserting_before(self._first):
            node = self.graph.create_node("get_attr", name)
        node.meta = {"val": value, META: self._provenance()}
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

    def _custom(self) -> dict[str, Any]:
        """What torch.export carries through a re-export, and so into ONNX."""
        assert self.site is not None
        name, _, label = self._entry_id.partition(":")
        return {"surgery": {"pass": name, "name": label or "default", "site": self.site.path}}

    def _provenance(self) -> dict[str, Any]:
        assert self.site is not None
        return {"entry": self._entry_id, "site": self.site.path, "aux": True}


def _standing_for(source: fx.Node) -> set[fx.Node]:
    """The parameter's node, and what passes have put in its place."""
    return {n for n in source.graph.nodes if n is source or parameter_of(n) == source.target}


def _weight_readers(call: Call) -> list[fx.Node]:
    """The nodes on the way from the weight to this call's op that read the weight itself."""
    assert call.weight is not None
    standing = _standing_for(call.weight)
    name = call.op.x if call.x_axis == "column" else call.op.weights[0]
    node, value = call.node, arguments(call.node)[name]
    while value not in standing:
        node, value = value, value.args[0]
    return [node]
