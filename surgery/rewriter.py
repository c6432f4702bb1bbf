"""The one thing that changes a graph. It fills `val`, `nn_module_stack` and provenance of every new node."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from surgery.errors import PassError
from surgery.sites import META, Site, head, tail
from surgery.weight_ops import Call, operand

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
    `weight` scales what an adapter adds (1 as trained, 0 as absent).
    """

    def __init__(
        self,
        graph: fx.Graph,
        cache: MetaCache,
        entry_id: str,
        names: Mapping[str, str],
        tensors: Mapping[str, torch.Tensor],
        weight: float = 1.0,
    ) -> None:
        self.graph = graph
        self.weight = weight
        self._cache = cache
        self._entry_id = entry_id
        self._names = names  # tensor of the pass -> its name in the program
        self._tensors = tensors
        self._attributes: dict[str, fx.Node] = {}
        self._first = next(iter(graph.nodes))
        self.site: Site | None = None
        self.call_: Call | None = None

    def rewrite(self, site: Site, build: Any) -> None:
        """Call build(site, self) at every call of the site and put what it returns in the output's place."""
        self.site, self._attributes = site, {}
        for call in site.calls:
            self.call_ = call
            # Read now, not from the call: a site before this one may have been rewritten since it was indexed.
            self.x, self.out = head(operand(call)), tail(call.node)
            self._anchor = self.out.next
            self._new: dict[fx.Node, None] = {}
            value = build(site, self)
            if value is None or value is self.out:
                continue
            if not isinstance(value, fx.Node):
                raise PassError(
                    f"{self._entry_id} at {site.path}: rewrite must return a graph value, got {value!r}"
                )
            # Before the swap: `wraps` names the inner value, so that a later pass finds the outermost.
            value.meta[META]["wraps"] = self.out.name
            self.out.replace_all_uses_with(value, delete_user_cb=lambda node: node not in self._new)

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
                node.meta[META]["input"] = True
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

    def _custom(self) -> dict[str, Any]:
        """What torch.export carries through a re-export, and so into ONNX."""
        assert self.site is not None
        name, _, label = self._entry_id.partition(":")
        return {"surgery": {"pass": name, "name": label or "default", "site": self.site.path}}

    def _provenance(self) -> dict[str, Any]:
        assert self.site is not None
        return {"entry": self._entry_id, "site": self.site.path, "aux": True}
