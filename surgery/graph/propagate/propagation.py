"""Runs nodes in graph order on their new inputs, and walks back from a node that needs another length."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from surgery.common.errors import PassError
from surgery.graph.fake import MetaCache
from surgery.graph.propagate import backward, forward
from surgery.graph.propagate.arguments import Arguments, Draft
from surgery.graph.propagate.sizes import (
    Dim,
    Products,
    Size,
    Unclear,
    describe,
    is_one,
    is_size,
    on_data,
    same,
)

# Limit of steps back: the ops that make a mask or positions are near; a whole model is not meant to be walked.
_DEEPEST = 150
_REMEDY = "make the edit after this node, or capture the model with this dimension dynamic"


@dataclass(frozen=True)
class Repair:
    """Result of a propagation; lists are in graph order.

    Attributes:
        repaired: nodes whose arguments changed.
        created: size nodes that were inserted for them.
        dropped: names of removed assertions on a baked size.
        picks: nodes that read a constant part of a changed dimension (`x[:, 0]`, `x[:, :5]`). Their shape is right,
            but the elements they read depend on where the sequence grew.
        updated: number of nodes with a new shape.
    """

    repaired: list[fx.Node] = field(default_factory=list)
    created: list[fx.Node] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    picks: list[fx.Node] = field(default_factory=list)
    updated: int = 0


def _as_much_data(old: Any, new: Any) -> bool:
    """True if two values differ only in symbols for data-dependent sizes."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.dim() == new.dim():
        pairs = list(zip(old.shape, new.shape, strict=True))
    else:
        pairs = [(old, new)]
    unknown = [on_data(a) and on_data(b) for a, b in pairs]
    return any(unknown) and all(
        u or (is_size(a) and is_size(b) and same(a, b)) for u, (a, b) in zip(unknown, pairs, strict=True)
    )


class Propagation:
    """State of one run. `forward` and `backward` hold the rules of the ops."""

    def __init__(
        self, graph: fx.Graph, replaced: Mapping[fx.Node, fx.Node], fixed: Collection[fx.Node]
    ) -> None:
        self.graph = graph
        self.mode = MetaCache(graph).mode
        self.order: dict[fx.Node, float] = {node: float(i) for i, node in enumerate(graph.nodes)}
        self.fixed = {*replaced, *fixed}
        self.products = Products()
        self.arguments = Arguments(self)
        # Rules start from a node's original arguments at every visit, so the order of visits does not matter.
        self.originals: dict[fx.Node, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        self.wanted: dict[fx.Node, dict[int, Size]] = {}
        # Slices that may be meant to cover the whole dimension.
        self.pending: dict[fx.Node, str] = {}
        self.picks: set[fx.Node] = set()
        self.dropped: set[fx.Node] = set()
        # Constant sizes that some dimension had before and no dimension has now.
        self.lengths: set[int] = set()
        self._replaced = dict(replaced)
        self._changed: set[fx.Node] = set()
        self._queue: list[tuple[float, int, fx.Node]] = []
        self._due: set[fx.Node] = set()
        self._results: dict[Any, tuple[Any, Exception | None]] = {}
        self._described: dict[int, tuple[Any, Any]] = {}
        self._depth = 0
        self._old: dict[fx.Node, Any] = {}

    def run(self) -> Repair:
        """Propagate until no node is due, or restore the graph and raise.

        Raises:
            PassError: if a node cannot be followed.
        """
        metas = {node: dict(node.meta) for node in self.graph.nodes}
        env = self.mode.shape_env
        try:
            # Sizes that depend on the example (contiguity, a slice within its range) must not become guards.
            with ExitStack() as quiet:
                if env is not None:
                    quiet.enter_context(env.suppress_guards())
                    quiet.enter_context(env.ignore_fresh_unbacked_symbols())
                self._start()
                while self._queue:
                    self._visit_due(heapq.heappop(self._queue)[2])
                for node, why in self.pending.items():
                    self.refuse(node, why, _REMEDY)
        except BaseException:
            for node, (target, args, kwargs) in self.originals.items():
                node.target, node.args, node.kwargs = target, args, kwargs
            for node in reversed(self.arguments.created):
                self.graph.erase_node(node)
            for node, meta in metas.items():
                node.meta = meta
            raise
        return self._finish()

    def _start(self) -> None:
        for node in self.graph.nodes:
            if "val" not in node.meta and node.op == "call_function":
                node.meta["val"] = self.call(node.target, node.args, node.kwargs, node)
        self._old = {node: node.meta.get("val") for node in self.graph.nodes}
        for node in self._replaced:
            self.put(node, node.meta["val"], first=True)

    def _finish(self) -> Repair:
        def in_order(nodes: Collection[fx.Node]) -> list[fx.Node]:
            return sorted(nodes, key=lambda n: self.order[n])

        repaired = [
            n
            for n, (target, args, kwargs) in self.originals.items()
            if n not in self.dropped and (n.target, n.args, n.kwargs) != (target, args, kwargs)
        ]
        self.dropped.update(forward.stale_assertions(self.graph, self.lengths))
        dropped = [n.name for n in in_order(self.dropped)]
        for node in self.dropped:
            self.graph.erase_node(node)
        created: list[fx.Node] = []
        for node in reversed(in_order(self.arguments.created)):
            if node.users:
                created.insert(0, node)
            else:
                self.graph.erase_node(node)
        return Repair(in_order(repaired), created, dropped, in_order(self.picks), len(self._changed))

    # -- values

    def before(self, node: fx.Node) -> Any:
        """Return the value that the users of a node saw before the edit."""
        return self._old[self._replaced.get(node, node)]

    def moved(self, node: fx.Node) -> bool:
        """True if a node's value has another shape than before the edit."""
        return node in self._changed

    def dims(self, node: fx.Node) -> list[Dim]:
        """Return a node's dimensions before and after the edit."""
        old, new = self.before(node).shape, node.meta["val"].shape
        return [Dim(a, b) for a, b in zip(old, new, strict=True)]

    def put(self, node: fx.Node, value: Any, first: bool = False) -> None:
        """Set a node's new value, and schedule its users if it differs.

        Args:
            node: node to update.
            value: new value, a fake tensor or a number.
            first: True for the ends of the edit, whose users have not seen the value yet.
        """
        old, have = self.before(node), node.meta["val"]
        if _as_much_data(old, value):
            value = old  # A fresh symbol would carry no more information.
        node.meta["val"] = value
        if self._describe(old) == self._describe(value):
            self._changed.discard(node)
        else:
            self._changed.add(node)
            self._check_shapes(node, old, value)
        if self._describe(have) == self._describe(value) and not (first and node in self._changed):
            return
        node.meta.pop("tensor_meta", None)
        for user in node.users:
            self.push(user)

    def _check_shapes(self, node: fx.Node, old: Any, new: Any) -> None:
        olds, news = (v if isinstance(v, (list, tuple)) else [v] for v in (old, new))
        if len(olds) != len(news):
            self.refuse(node, f"it would return {len(news)} tensors instead of {len(olds)}", _REMEDY)
        for a, b in zip(olds, news, strict=True):
            if not isinstance(a, torch.Tensor):
                continue
            if a.dim() != b.dim():
                self.refuse(node, f"its rank would change from {a.dim()} to {b.dim()}", _REMEDY)
            for was, now in zip(a.shape, b.shape, strict=True):
                if isinstance(was, int) and not same(was, now):
                    self.lengths.add(was)
                    # A user may broadcast a dimension of length 1, and would compute something else on a longer one.
                if isinstance(was, int) and was == 1 and not same(was, now):
                    why = f"a length of 1 becomes {now}, and a length of 1 may be a broadcast"
                    self.refuse(node, why, "start from a longer sequence")
                if isinstance(was, torch.SymInt) and isinstance(now, int):
                    self.refuse(node, f"the dynamic size {was} would be fixed at {now}", _REMEDY)

    def push(self, node: fx.Node) -> None:
        if node not in self._due:
            self._due.add(node)
            heapq.heappush(self._queue, (self.order[node], id(node), node))

    def add_node(self, node: fx.Node, order: float) -> None:
        self.order[node] = order
        self._old[node] = node.meta["val"]

    def call(self, target: Any, args: Any, kwargs: Any, node: fx.Node) -> Any:
        """Run an op on the nodes' values; refuse the node if the op fails.

        Args:
            target: op to call.
            args: positional arguments, with nodes.
            kwargs: keyword arguments, with nodes.
            node: node that an error message names.
        """
        value, error = self._result(target, args, kwargs)
        if error is not None:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.refuse(node, f"it fails on the new shapes ({first})", _REMEDY)
        return value

    def works(self, target: Any, args: Any, kwargs: Any) -> bool:
        """True if an op runs on the nodes' values."""
        return self._result(target, args, kwargs)[1] is None

    def _result(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Exception | None]:
        """Run an op once for equal shapes, because the layers of a model repeat them."""
        values = fx.node.map_arg((tuple(args), dict(kwargs)), lambda n: n.meta["val"])
        key = (target, self._key(values))
        if key not in self._results:
            try:
                # Kernels in C++ would specialize symbols to the example's sizes; the Python dispatcher does not.
                with self.mode, enable_python_dispatcher(), torch.no_grad():
                    self._results[key] = target(*values[0], **values[1]), None
            except Exception as error:
                self._results[key] = None, error
        return self._results[key]

    def _key(self, value: Any) -> Any:
        if isinstance(value, dict):
            return tuple((name, self._key(item)) for name, item in value.items())
        if isinstance(value, (tuple, list)):
            return type(value).__name__, *(self._key(item) for item in value)
        return self._describe(value)

    def _describe(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return describe(value)
        known = self._described.get(id(value))
        if known is None:
            known = self._described[id(value)] = (
                describe(value),
                value,  # The reference keeps the tensor alive, so that its id is not reused.
            )
        return known[0]

    # -- visiting

    def _visit_due(self, node: fx.Node) -> None:
        if node in self._due:
            self.visit(node)

    def visit(self, node: fx.Node) -> None:
        """Run a node on its current inputs, with updated size arguments."""
        self._due.discard(node)
        if node.op == "output":
            return
        # A demand may reach a node before its operands had their turn in the queue.
        for operand in node.all_input_nodes:
            self._visit_due(operand)
        if node.op != "call_function" or not (
            isinstance(node.target, torch._ops.OpOverload) or callable(node.target)
        ):
            self.refuse(node, f"a {node.op} node is not supported", _REMEDY)
        if node in self.fixed or node in self.arguments.known:
            self.put(node, self.call(node.target, node.args, node.kwargs, node))
            return
        target, args, kwargs = self.originals.setdefault(node, (node.target, node.args, node.kwargs))
        draft = Draft(target, list(args), dict(kwargs))
        try:
            value = forward.follow(self, node, draft)
        except Unclear as error:
            self.refuse(node, str(error), _REMEDY)
        if (node.target, node.args, node.kwargs) != (draft.target, tuple(draft.args), draft.kwargs):
            node.target, node.args, node.kwargs = draft.target, tuple(draft.args), draft.kwargs
        self.put(node, value)

    def agree(self, node: fx.Node, places: list[tuple[fx.Node, int]]) -> None:
        """Make dimensions of a node's operands equal again after one of them changed.

        Args:
            node: node that reads the operands.
            places: operand and dimension of each member of the group.
        """
        dims = [(operand, dim, self.dims(operand)[dim]) for operand, dim in places]
        lead = next((d for _, _, d in dims if d.moved), None)
        if lead is None:
            return
        for operand, dim, found in dims:
            if same(found.new, lead.new) or is_one(found.new):
                continue
            # An operand that changed to another length, or had another length before, cannot simply be lengthened.
            if found.moved or not same(found.old, lead.old):
                why = f"its operands now have lengths {lead.new} and {found.new}"
                self.refuse(node, f"{why} ('{operand.name}', from {self.origin(operand)})", _REMEDY)
            self.demand(node, operand, dim, lead.new)

    def demand(self, reader: fx.Node, node: fx.Node, dim: int, size: Size) -> None:
        """Give a dimension of a node another size, by changing the op that made it.

        Args:
            reader: node that needs the size.
            node: node to change.
            dim: dimension of the node.
            size: size it must have.

        Raises:
            PassError: if the size comes from an input or a fixed tensor, or cannot be changed.
        """
        self._visit_due(node)
        dim %= node.meta["val"].dim()
        have = self.dims(node)[dim]
        if same(have.new, size):
            return
        stayed = f"'{node.name}' has length {have.new} where {size} is needed"
        if node.op == "placeholder":
            self.refuse(reader, stayed, f"lengthen the input '{node.target}' too")
        if node.op == "get_attr":
            self.refuse(reader, f"the tensor '{node.target}' is fixed: {stayed}", _REMEDY)
        if have.moved:
            self.refuse(reader, f"{stayed}, and it was {have.old}", _REMEDY)
        if node in self.fixed:
            self.refuse(reader, f"{stayed}, and it was inserted by the pass", "insert it with that length")
        if self._depth > _DEEPEST:
            self.refuse(reader, f"{stayed}; it comes from {self.origin(node)}", _REMEDY)
        self._depth += 1
        try:
            backward.follow(self, reader, node, dim, size)
            self.visit(node)
        except Unclear as error:
            self.refuse(node, str(error), _REMEDY)
        finally:
            self._depth -= 1
        if not same(node.meta["val"].shape[dim], size):
            self.refuse(reader, f"{stayed}; it comes from {self.origin(node)}", _REMEDY)

    def want(self, node: fx.Node, dim: int, size: Size) -> None:
        """Record the size that a node's own arguments must produce; its forward rule writes it."""
        self.wanted.setdefault(node, {})[dim] = size

    # -- Messages

    def origin(self, node: fx.Node) -> str:
        """Return the names of up to three inputs and tensors that a value is computed from, for a message."""
        names: list[str] = []
        seen, todo = {node}, [node]
        while todo and len(names) < 3:
            current = todo.pop(0)
            if current.op in ("placeholder", "get_attr"):
                names.append(f"'{current.target}'")
            for operand in current.all_input_nodes:
                if operand not in seen:
                    seen.add(operand)
                    todo.append(operand)
        return ", ".join(names) or f"'{node.name}'"

    def refuse(self, node: fx.Node, why: str, remedy: str) -> Any:
        """Raise an error that names the node and its module.

        Args:
            node: node that cannot be followed.
            why: reason.
            remedy: advice to the user, an imperative.

        Raises:
            PassError: always.
        """
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed([path for path, _ in stack.values()]), "")
        name = getattr(node.target, "__name__", str(node.target))
        where = f"{path or 'the model'}, {name} ('{node.name}')"
        raise PassError(f"the sequence cannot be made longer at {where}: {why}; {remedy}")
