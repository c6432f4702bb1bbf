"""Interface of a propagation, as the op rules see it.

The rules call the walk (`demand` a length, `visit` a node), and the walk calls the rules. This interface lies below
both, so that their modules do not import each other.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import fx

from surgery.graph.propagate.sizes import Dim, Products, Size


class SizeArguments(Protocol):
    """Reads and writes sizes in node arguments; see `arguments.Arguments`."""

    def value(self, argument: Any) -> Any:
        """Return the current value of an argument."""
        ...

    def before(self, argument: Any) -> Any:
        """Return the value of an argument before the edit."""
        ...

    def fit(self, argument: Any, size: Size, user: fx.Node) -> Any:
        """Return the argument if it has this size already, else an argument of `user` that has."""
        ...

    def write(self, size: Size, like: Any, user: fx.Node) -> Any:
        """Return an argument of `user` for a size; `like` is the current argument."""
        ...


class Run(Protocol):
    """State of one propagation, as rules see it; see `propagation.Propagation`.

    Attributes:
        order: position of each node in the graph.
        products: factors of merged dimensions.
        wanted: sizes that a node's own arguments must produce, by dimension.
        pending: nodes to refuse at the end unless a later request settles them, with the reason.
        picks: nodes that read a constant part of a dimension that changed.
        dropped: assertions that no longer hold.
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

    def before(self, node: fx.Node) -> Any:
        """Return the value that the users of a node saw before the edit."""
        ...

    def moved(self, node: fx.Node) -> bool:
        """True if a node's value has another shape than before the edit."""
        ...

    def dims(self, node: fx.Node) -> list[Dim]:
        """Return a node's dimensions before and after the edit."""
        ...

    def agree(self, node: fx.Node, places: list[tuple[fx.Node, int]]) -> None:
        """Make operand dimensions of a node equal again after one of them changed."""
        ...

    def demand(self, reader: fx.Node, node: fx.Node, dim: int, size: Size) -> None:
        """Give a dimension of `node` another size, because `reader` needs it."""
        ...

    def want(self, node: fx.Node, dim: int, size: Size) -> None:
        """Record the size that a node's own arguments must produce."""
        ...

    def visit(self, node: fx.Node) -> None:
        """Run a node on its current inputs, with updated size arguments."""
        ...

    def call(self, target: Any, args: Any, kwargs: Any, node: fx.Node) -> Any:
        """Run an op on the nodes' values; an error names `node`."""
        ...

    def works(self, target: Any, args: Any, kwargs: Any) -> bool:
        """True if an op runs on the nodes' values."""
        ...

    def add_node(self, node: fx.Node, order: float) -> None:
        """Register an inserted node and its position in the graph."""
        ...

    def origin(self, node: fx.Node) -> str:
        """Return the names of inputs and tensors that a value is computed from, for a message."""
        ...
