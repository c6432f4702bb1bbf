"""Arguments of nodes, and sizes as arguments: a number, a node that has it, or new nodes that compute it."""

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
    """The arguments of a node, while a rule reads or mends them."""

    target: Any
    args: list[Any]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> Draft:
        return cls(node.target, list(node.args), dict(node.kwargs))

    def get(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def set(self, index: int, name: str, value: Any) -> None:
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value


class Arguments:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._made: dict[Any, fx.Node] = {}
        self.created: list[fx.Node] = []
        self.known: set[fx.Node] = set()  # the same, to look up

    def value(self, argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, fx.Node) else argument

    def before(self, argument: Any) -> Any:
        return self._run.before(argument) if isinstance(argument, fx.Node) else argument

    def fit(self, argument: Any, size: Size, user: fx.Node) -> Any:
        """The argument where it has this size, else one that does.

        An argument that moved by itself follows another length than the operand, and is not overruled.
        """
        if same(self.value(argument), size):
            return argument
        if isinstance(argument, fx.Node) and self._run.moved(argument):
            raise Unclear(
                f"its argument '{argument.name}' became {self.value(argument)}, where its operand asks for {size}"
            )
        return self.write(size, argument, user)

    def write(self, size: Size, like: Any, user: fx.Node) -> Any:
        wanted = expr(size)
        if wanted.is_Integer:
            return int(wanted)
        if isinstance(like, fx.Node):
            step = sympy.expand(wanted - expr(self.value(like)))
            if step.is_Integer:
                return self._step(like, int(step)) if step else like
        return self._compute(wanted, user)

    def _step(self, node: fx.Node, step: int) -> fx.Node:
        return self._make(operator.add, (node, step), user=node)

    def _compute(self, wanted: sympy.Expr, user: fx.Node) -> Any:
        if wanted.is_Integer:
            return int(wanted)
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
        raise Unclear(f"no node before it computes the size {wanted}")

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
        """The symbol read off an input."""
        inputs = [n for n in self._run.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            value = node.meta.get("val")
            if is_size(value) and expr(value) == symbol:
                return node
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if expr(size) == symbol:
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
        following = order.get(node.next, order[after] + 1)
        self._run.add_node(node, (order[after] + following) / 2)
        self._made[op, args] = node
        self.created.append(node)
        self.known.add(node)
        return node
