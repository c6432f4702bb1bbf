"""Probe: measures tensors, activations and gradients of a program while a pass is planned or applied."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from surgery.capture import Captured
from surgery.capture.devices import on_device
from surgery.common.errors import PassError
from surgery.engine.journal import Journal
from surgery.engine.state import State
from surgery.graph.compiled import compiled
from surgery.graph.graphs import copy_graph, flat_inputs
from surgery.graph.marks import input_before_adapters
from surgery.graph.ops import LINEAR, arguments, operand
from surgery.graph.packed import eagerly_on, unpacking
from surgery.graph.rewrite.current import weight_reader
from surgery.graph.sites import Site
from surgery.graph.view import View

InputSet = tuple[tuple[Any, ...], Mapping[str, Any]]


class Probe:
    """Measurements on a program, on its device. Not available in a replay of a journal: a replay measures nothing.

    Attributes:
        program: The program.
        data: Inputs to measure on, a sequence of (args, kwargs); by default the program's example inputs.
        given: True if the caller provided data.
    """

    def __init__(self, program: State, data: Sequence[InputSet] = ()) -> None:
        self.program = program
        self.given = bool(data)
        self.data: Sequence[InputSet] = data or [program.example_inputs]
        self._state: dict[str, Tensor] | None = None
        self._products: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._made: dict[Hashable, Any] = {}

    @property
    def view(self) -> View:
        """The analysis of the program's eval graph."""
        return self.program.view

    @property
    def in_memory(self) -> bool:
        """False where the weights are fake, so that nothing can be measured."""
        return self.program.base.in_memory

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Parameter name -> all names of that tensor."""
        return self.program.names

    @property
    def journal(self) -> Journal:
        """The program's journal."""
        return self.program.journal

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors that earlier passes inserted, by name."""
        return self.program.tensors

    @property
    def captured(self) -> Captured:
        """The program's eval capture."""
        return self.program.captured

    def tensor(self, name: str) -> Tensor:
        """Current value of a parameter or buffer, detached.

        Raises:
            PassError: It is not in memory.
        """
        if not self.program.base.in_memory:
            raise PassError(f"{name} is not in memory, and this pass has to read it; load the weights first")
        if name in self.program.base.released:
            raise PassError(f"{name} was released from memory; load the saved directory again")
        if self._state is None:
            self._state = self.program.state()
        return self._state[name].detach()

    def weight(self, site: Site) -> Tensor:
        """The weight of a site, as stored.

        Raises:
            PassError: The weight is computed by other ops, or is not in memory.
        """
        if site.weight is None:
            raise PassError(
                f"{site.path}: its weight is computed from {', '.join(site.computed_from)}, not stored; "
                f"target another site"
            )
        return self.tensor(site.weight)

    def dequantized(self, site: Site) -> Tensor:
        """The weight of a site in floating point: as stored, or as its op unpacks it."""
        own = self.weight(site)
        return as_tensor(site, self._constant) if site.packed else own

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Result of make(), cached under the key until `forget`, for values that several methods of a pass need.

        Args:
            key: Key of the value.
            make: Function that computes it.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def forget(self, key: Hashable) -> None:
        """Remove a value that `once` cached."""
        self._made.pop(key, None)

    def clear(self) -> None:
        """Remove all cached values. Sites in a report refer to their probe and would keep these in memory."""
        self._state = None
        for found in (self._products, self._largest, self._made):
            found.clear()

    def stored(self, site: Site) -> Tensor:
        """The weight that the site's op reads now, in floating point: the parameter, or a pass's replacement of it."""
        if site.packed:
            return self.dequantized(site)
        own = self.weight(site)
        current = weight_reader(site.calls[0])[1]
        return own if current is site.calls[0].weight else self._constant(current)

    def _constant(self, node: fx.Node) -> Tensor:
        """The value of a node that depends on no input."""
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.program.graph_module)
        with torch.no_grad():
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._constant)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def values(self, nodes: Iterable[fx.Node | str]) -> dict[str, list[Tensor]]:
        """Values of nodes of the eval graph on each set of data, by node name, without gradients.

        Args:
            nodes: Nodes of the program's eval graph, or their names.
        """
        names = {node if isinstance(node, str) else node.name for node in nodes}
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        self.watch(names, lambda name, value: found[name].append(value))
        return found

    def watch(self, names: set[str], see: Callable[[str, Any], Any]) -> None:
        """Run the eval graph on each set of data and call `see(name, value)` for each of the named nodes.

        Args:
            names: Names of nodes.
            see: Function that receives each value as it is computed; values are not stored.
        """

        class Recording(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n.name in names:
                    see(n.name, value)
                return value

        module = self.program.graph_module
        for values in self.inputs_of_graph():
            with torch.no_grad():
                Recording(module).run(*values, enable_io_processing=False)

    def module(self) -> fx.GraphModule:
        """A copy of the eval graph as a module over the same tensors, for tools that edit the graph they measure."""
        module = self.program.graph_module
        return compiled(module, copy_graph(module.graph))

    def run(self, module: fx.GraphModule) -> None:
        """Run a module that was derived from `module()` on each set of data, without gradients."""
        for values in self.inputs_of_graph():
            with torch.no_grad():
                fx.Interpreter(module).run(*values, enable_io_processing=False)

    def inputs_of_graph(self) -> Iterator[list[Any]]:
        """Each set of data as a list of values of the graph's inputs.

        Raises:
            PassError: A set of data does not fit the inputs, or contains NaN or +inf.
        """
        module = self.program.graph_module
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        for number, given in enumerate(self.data, 1):
            if not (isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Mapping)):
                raise PassError(
                    f"data set {number} is not a pair; give (args, kwargs) as the model takes them"
                )
            values = flat_inputs(module, *on_device(tuple(given), self.program.device))
            if len(values) != len(inputs):
                names = ", ".join(node.name for node in inputs)
                raise PassError(f"data set {number} has {len(values)} inputs, and the model takes {names}")
            for node, value in zip(inputs, values, strict=True):
                wrong = _misfit(node.meta.get("val"), value)
                if wrong:
                    raise PassError(f"data set {number}: the input {node.name!r} {wrong}")
            yield values

    def inputs(self, site: Site) -> list[Tensor]:
        """Input activation of the site's first call on each set of data, with features on the last axis."""
        call = site.calls[0]
        node = operand(call)
        values = self.values([node])[node.name]
        columns = call.kind == LINEAR and call.x_axis == "column"
        return [value.transpose(-2, -1) for value in values] if columns else values

    def products(self, site: Site) -> Tensor:
        """XᵀX (in × in, fp64) of the input X of a linear site, over all positions of the data, summed over its calls.

        The first call measures all linear sites in one run over the data and caches the results.
        """

        def entering(each: Site) -> list[tuple[str, bool]]:
            return [(operand(call).name, call.x_axis == "column") for call in each.calls]

        if not self._products:
            sites = [s for s in self.program.sites if s.kind == LINEAR]
            wanted = {operand(call).name for s in sites for call in s.calls}
            columns = dict(pair for s in sites for pair in entering(s))
            self.watch(wanted, lambda name, value: self._add_products(name, value, columns[name]))
        return torch.stack([self._products[name] for name, _ in entering(site)]).sum(0)

    def _add_products(self, name: str, value: Tensor, columns: bool) -> None:
        rows = _rows(name, value.transpose(-2, -1) if columns else value).double()
        found = rows.T @ rows
        self._products[name] = self._products[name] + found if name in self._products else found

    def largest(self, site: Site) -> Tensor:
        """Largest magnitude of each input feature (in, fp32) of a linear site, over all positions of the data.

        It is the maximum over all calls of the site, measured before passes that change the input. The site must have
        features on the last axis of its input. As in `products`, the first call measures all such sites.
        """

        def see(name: str, value: Tensor) -> None:
            found = _rows(name, value).abs().amax(0).float()
            self._largest[name] = torch.maximum(self._largest.get(name, found), found)

        if not self._largest:
            calls = [call for s in self.program.sites if s.kind == LINEAR for call in s.calls]
            self.watch(
                {input_before_adapters(operand(call)).name for call in calls if call.x_axis != "column"}, see
            )
        return torch.stack(
            [self._largest[input_before_adapters(operand(call)).name] for call in site.calls]
        ).amax(0)


def _rows(name: str, value: Tensor) -> Tensor:
    """A value reshaped to (positions, features). Raises PassError if it is not finite."""
    rows = value.reshape(-1, value.shape[-1])
    if not bool(rows.isfinite().all()):
        raise PassError(f"on the data the value {name!r} contains inf or NaN; clean the data")
    return rows


def _misfit(example: Any, value: Any) -> str:
    """Reason why a value does not fit an input that was traced with `example`, or ""."""
    if not isinstance(example, Tensor):
        return ""
    if not isinstance(value, Tensor):
        return f"is {type(value).__name__}, and the model takes a tensor"
    wanted = [size if isinstance(size, int) else None for size in example.shape]
    fits = len(wanted) == value.dim() and all(
        w in (None, s) for w, s in zip(wanted, value.shape, strict=True)
    )
    if not fits:
        shown = ", ".join("any" if size is None else str(size) for size in wanted)
        return f"has shape {list(value.shape)}, and the model takes [{shown}]"
    if value.is_floating_point() != example.is_floating_point():
        return f"is {value.dtype}, and the model takes {example.dtype}"
    # −inf is allowed: additive attention masks contain it.
    wrong = value.is_floating_point() and bool((value.isnan() | (value == torch.inf)).any())
    return "contains inf or NaN; clean the data" if wrong else ""


def as_tensor(site: Site, value_of: Callable[[fx.Node], Tensor]) -> Tensor:
    """The packed weight of a site in floating point.

    Args:
        site: A site whose op unpacks its weight.
        value_of: Function node -> value, for the nodes that the op reads.
    """
    call = site.calls[0]
    found, args = unpacking(call), arguments(call.node)
    tensors = {name: value_of(args[name]).detach() for name in found.names}
    device = next(iter(tensors.values())).device
    own = [constant.to(device) for constant in found.constants]
    with torch.no_grad():
        return found.run(eagerly_on(device), tensors, own, site.float_dtype)
