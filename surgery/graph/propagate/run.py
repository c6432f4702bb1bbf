"""The interface of one propagation that the rules of ops are written against.

The rules call the walk (`demand` a length, `visit` a node), and the walk calls the rules. This interface lies below
both, so that neither imports the other in a circle.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import fx

from surgery.graph.propagate.sizes import Dim, Products, Size


class SizeArguments(Protocol):
    """Reads and writes sizes among the arguments of nodes; see `arguments.Arguments`."""

    def value(self, argument: Any) -> Any: ...

    def before(self, argument: Any) -> Any: ...

    def fit(self, argument: Any, size: Size, user: fx.Node) -> Any: ...

    def write(self, size: Size, like: Any, user: fx.Node) -> Any: ...


class Run(Protocol):
    """The state of one propagation, as rules see it; see `propagation.Propagation`.

    order: position of each node in the graph. wanted: sizes that a node's own argument has to give, by dimension.
    pending: nodes that may be refused at the end, with the reason. picks: nodes that take a fixed part of a dimension
    that changed. dropped: assertions that no longer hold.
    """

    graph: fx.Graph
    order: dict[fx.Node, float]
    products: Products
    wanted: dict[fx.Node, dict[int, Size]]
    pending: dict[fx.Node, str]
    picks: set[fx.Node]
    dropped: set[fx.Node]

    @property
    def arguments(self) -> SizeArguments: ...

    def before(self, node: fx.Node) -> Any: ...

    def moved(self, node: fx.Node) -> bool: ...

    def dims(self, node: fx.Node) -> list[Dim]: ...

    def agree(self, node: fx.Node, places: list[tuple[fx.Node, int]]) -> None: ...

    def demand(self, reader: fx.Node, node: fx.Node, dim: int, size: Size) -> None: ...

    def want(self, node: fx.Node, dim: int, size: Size) -> None: ...

    def visit(self, node: fx.Node) -> None: ...

    def call(self, target: Any, args: Any, kwargs: Any, node: fx.Node) -> Any: ...

    def works(self, target: Any, args: Any, kwargs: Any) -> bool: ...

    def add_node(self, node: fx.Node, order: float) -> None: ...

    def origin(self, node: fx.Node) -> str: ...
