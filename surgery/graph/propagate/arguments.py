"""Reads and writes sizes in node arguments: as a number, an existing node, or new nodes that compute the size."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from surgery.graph.propagate.run import Run
from surgery.graph.propagate.sizes import Size, Unclear, expr, is_size, same

aten = torch.ops.aten


@dataclass
class Draft:
    """Editable arguments of a node, used while a rule updates them."""

    target: Any
    args: list[Any]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> Draft:
        """Copy the arguments of a node."""
        return cls(node.target, list(node.args), dict(node.kwargs))

    def get(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def set(self, index: int, name: str, value: Any) -> None:
        """Set an argument: by position if it was passed by position, else by name."""
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value


class Arguments:
    """Finds or creates the nodes for the sizes of one propagation.

    Attributes:
        created: size nodes inserted so far.
        known: the same nodes as a set, for fast look-up.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._made: dict[Any, fx.Node] = {}
        self.created: list[fx.Node] = []
        self.known: set[fx.Node] = set()

    def value(self, argument: Any) -> Any:
        """Return the current value of an argument."""
        return argument.meta["val"] if isinstance(argument, fx.Node) else argument

    def before(self, argument: Any) -> Any:
        """Return the value of an argument before the edit."""
        return self._run.before(argument) if isinstance(argument, fx.Node) else argument

    def fit(self, argument: Any, size: Size, user: fx.Node) -> Any:
        """Return the argument if it has this size already, else an argument that has.

        Args:
            argument: the current argument, a number or a node.
            size: required size.
            user: node that the argument belongs to.

        Raises:
            Unclear: if the argument has changed by itself to another size. It follows another length than the
                operand, so it must not be overwritten.
        """
        if same(self.value(argument), size):
            return argument
        if isinstance(argument, fx.Node) and self._run.moved(argument):
            raise Unclear(
                f"its argument '{argument.name}' became {self.value(argument)}, but its operand requires {size}"
            )
        return self.write(size, argument, user)

    def write(self, size: Size, like: Any, user: fx.Node) -> Any:
        """Return an argument for a size.

        Args:
            size: required size.
            like: the current argument. If it is a node that differs by a constant, the constant is added to it.
            user: node that the argument belongs to.
        """
        wanted = expr(size)
        if wanted.is_Integer:
            return int(wanted)
        if isinstance(like, fx.Node):
            # A constant difference keeps the original symbol, so the graph stays valid for every dynamic size.
            step = sympy.expand(wanted - expr(self.value(like)))
            if step.is_Integer:
                return self._step(like, int(step)) if step else like
        return self._compute(wanted, user)

    def _step(self, node: fx.Node, step: int) -> fx.Node:
        return self._make(operator.add, (node, step), user=node)

    def _compute(self, wanted: sympy.Expr, user: fx.Node) -> Any:
        if wanted.is_Integer:
            return int(wanted)
        # An existing node is preferred: equal sizes then stay one value, and the graph does not grow.
        found = self._find(wanted, user)
        if found is not None:
            return found
        if wanted.is_Symbol:
            found = self._read(wanted, user)
            if found is not None:
                return found
        if wanted.is_Add or wanted.is_Mul:
            op = operator.add if wanted.is_Add else operator.mul
            parts = [self._compute(part, user) for part in sorted(wanted.args, key=str)]
            result = parts[0]
            for part in parts[1:]:
                pair = (result, part) if isinstance(result, fx.Node) else (part, result)
                result = self._make(op, pair, user)
            return result
        if wanted.is_Pow and wanted.exp.is_Integer and wanted.exp > 1:
            base = self._compute(wanted.base, user)
            result = base
            for _ in range(int(wanted.exp) - 1):
                result = self._make(operator.mul, (result, base), user)
            return result
        raise Unclear(f"no earlier node computes the size {wanted}")

    def _find(self, wanted: sympy.Expr, user: fx.Node) -> fx.Node | None:
        order = self._run.order
        for node in [*self._numbers(), *self.created]:
            if order[node] < order[user] and expr(node.meta["val"]) == wanted:
                return node
        return None

    def _numbers(self) -> list[fx.Node]:
        return [
            n
            for n in self._run.graph.nodes
            if n.op == "call_function" and n not in self.known and isinstance(n.meta.get("val"), torch.SymInt)
        ]

    def _read(self, symbol: sympy.Expr, user: fx.Node) -> fx.Node | None:
        """Return a node that reads the symbol from an input: the input itself or a `sym_size` of it."""
        inputs = [n for n in self._run.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            value = node.meta.get("val")
            if is_size(value) and expr(value) == symbol:
                return node
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if expr(size) == symbol:
                        # All inputs come first in the graph, so the node is inserted after the last of them.
                        return self._make(aten.sym_size.int, (node, dim), user, after=inputs[-1])
        return None

    def _make(self, op: Any, args: tuple[Any, ...], user: fx.Node, after: fx.Node | None = None) -> fx.Node:
        if (op, args) in self._made:
            return self._made[op, args]
        order = self._run.order
        after = after or max((a for a in args if isinstance(a, fx.Node)), key=lambda n: order[n])
        with self._run.graph.inserting_after(after):
            node = self._run.graph.call_function(op, args)
        node.meta = {
            "val": self._run.call(op, args, {}, user),
            "nn_module_stack": dict(user.meta.get("nn_module_stack", {})),
            "stack_trace": user.meta.get("stack_trace", ""),
        }
        # A position between two neighbours is fractional, so that no other node needs a new number.
        following = order.get(node.next, order[after] + 1)
        self._run.add_node(node, (order[after] + following) / 2)
        self._made[op, args] = node
        self.created.append(node)
        self.known.add(node)
        return node
