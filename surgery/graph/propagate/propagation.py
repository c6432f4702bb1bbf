"""The walk: nodes in graph order, each run on its new inputs, and back where a length is wanted."""

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

_DEEPEST = 150  # steps back: what makes a mask or positions is near, a whole model is not
_REMEDY = "lengthen behind this node, or capture the model with this dimension dynamic"


@dataclass(frozen=True)
class Repair:
    """What was done, in graph order.

    repaired: nodes whose arguments changed. created: sizes that were inserted for them. dropped: names of
    assertions on a baked size that were removed. picks: nodes that take a fixed part of a dimension that moved
    (`x[:, 0]`, `x[:, :5]`): right in shape, but what they read depends on where the sequence grew.
    updated: how many nodes have another shape.
    """

    repaired: list[fx.Node] = field(default_factory=list)
    created: list[fx.Node] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    picks: list[fx.Node] = field(default_factory=list)
    updated: int = 0


def _as_much_data(old: Any, new: Any) -> bool:
    """Whether two values differ only by symbols for what depends on data."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.dim() == new.dim():
        pairs = list(zip(old.shape, new.shape, strict=True))
    else:
        pairs = [(old, new)]
    unknown = [on_data(a) and on_data(b) for a, b in pairs]
    return any(unknown) and all(
        u or (is_size(a) and is_size(b) and same(a, b)) for u, (a, b) in zip(unknown, pairs, strict=True)
    )


class Propagation:
    """The state of one run; `forward` and `backward` hold the rules of the ops."""

    def __init__(
        self, graph: fx.Graph, replaced: Mapping[fx.Node, fx.Node], fixed: Collection[fx.Node]
    ) -> None:
        self.graph = graph
        self.mode = MetaCache(graph).mode
        self.order: dict[fx.Node, float] = {node: float(i) for i, node in enumerate(graph.nodes)}
        self.fixed = {*replaced, *fixed}
        self.products = Products()
        self.arguments = Arguments(self)
        # A rule starts from what a node was, however often it is visited: the order of visits does not matter.
        self.originals: dict[fx.Node, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        self.wanted: dict[fx.Node, dict[int, Size]] = {}
        self.pending: dict[fx.Node, str] = {}  # cuts that may be meant whole
        self.picks: set[fx.Node] = set()
        self.dropped: set[fx.Node] = set()
        self.lengths: set[int] = set()  # fixed sizes that something had, and has no more
        self._replaced = dict(replaced)
        self._changed: set[fx.Node] = set()
        self._queue: list[tuple[float, int, fx.Node]] = []
        self._due: set[fx.Node] = set()
        self._results: dict[Any, tuple[Any, Exception | None]] = {}
        self._described: dict[int, tuple[Any, Any]] = {}
        self._depth = 0
        self._old: dict[fx.Node, Any] = {}

    def run(self) -> Repair:
        metas = {node: dict(node.meta) for node in self.graph.nodes}
        env = self.mode.shape_env
        try:
            # Sizes decided by the example (contiguity, a slice within its range) must not become guards.
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
        """What the users of a node saw before the edit."""
        return self._old[self._replaced.get(node, node)]

    def moved(self, node: fx.Node) -> bool:
        return node in self._changed

    def dims(self, node: fx.Node) -> list[Dim]:
        old, new = self.before(node).shape, node.meta["val"].shape
        return [Dim(a, b) for a, b in zip(old, new, strict=True)]

    def put(self, node: fx.Node, value: Any, first: bool = False) -> None:
        """Give a node its new value, and let its users follow where that is another one."""
        old, have = self.before(node), node.meta["val"]
        if _as_much_data(old, value):
            value = old  # a fresh symbol would say no more
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
            self.refuse(node, f"it would give {len(news)} tensors in the place of {len(olds)}", _REMEDY)
        for a, b in zip(olds, news, strict=True):
            if not isinstance(a, torch.Tensor):
                continue
            if a.dim() != b.dim():
                self.refuse(node, f"its rank would change from {a.dim()} to {b.dim()}", _REMEDY)
            for was, now in zip(a.shape, b.shape, strict=True):
                if isinstance(was, int) and not same(was, now):
                    self.lengths.add(was)
                if isinstance(was, int) and was == 1 and not same(was, now):
                    why = f"a length of 1 becomes {now}, and a length of 1 cannot be told from a broadcast"
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
        """The value of an op on the nodes' values; a failure is a refusal that names the node."""
        value, error = self._result(target, args, kwargs)
        if error is not None:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.refuse(node, f"it fails on the new shapes ({first})", _REMEDY)
        return value

    def works(self, target: Any, args: Any, kwargs: Any) -> bool:
        return self._result(target, args, kwargs)[1] is None

    def _result(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Exception | None]:
        """Each op once for shapes that are alike: the layers of a model are."""
        values = fx.node.map_arg((tuple(args), dict(kwargs)), lambda n: n.meta["val"])
        key = (target, self._key(values))
        if key not in self._results:
            try:
                # Kernels in C++ would fix symbols at the example's sizes; the Python dispatcher avoids them.
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
                value,
            )  # held, so that its id stays its own
        return known[0]

    # -- visiting

    def _visit_due(self, node: fx.Node) -> None:
        if node in self._due:
            self.visit(node)

    def visit(self, node: fx.Node) -> None:
        """Run a node on the inputs that it has now, with its sizes mended."""
        self._due.discard(node)
        if node.op == "output":
            return
        for operand in node.all_input_nodes:
            self._visit_due(operand)
        if node.op != "call_function" or not (
            isinstance(node.target, torch._ops.OpOverload) or callable(node.target)
        ):
            self.refuse(node, f"a {node.op} node cannot be followed", _REMEDY)
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
        """Let dimensions of a node's operands have one size again, where one of them moved."""
        dims = [(operand, dim, self.dims(operand)[dim]) for operand, dim in places]
        lead = next((d for _, _, d in dims if d.moved), None)
        if lead is None:
            return
        for operand, dim, found in dims:
            if same(found.new, lead.new) or is_one(found.new):
                continue
            if found.moved or not same(found.old, lead.old):
                why = f"its operands have lengths {lead.new} and {found.new} now"
                self.refuse(node, f"{why} ('{operand.name}', from {self.origin(operand)})", _REMEDY)
            self.demand(node, operand, dim, lead.new)

    def demand(self, reader: fx.Node, node: fx.Node, dim: int, size: Size) -> None:
        """Make a dimension of a node have a size, by changing what made it."""
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
            self.refuse(reader, f"{stayed}, and it was inserted by the pass", "make it of that length")
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
        self.wanted.setdefault(node, {})[dim] = size

    # -- saying

    def origin(self, node: fx.Node) -> str:
        """The inputs and tensors that a value is made of, for a message."""
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
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed([path for path, _ in stack.values()]), "")
        name = getattr(node.target, "__name__", str(node.target))
        where = f"{path or 'the model'}, {name} ('{node.name}')"
        raise PassError(f"the sequence cannot be made longer at {where}: {why}; {remedy}")
