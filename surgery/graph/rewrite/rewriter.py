"""Edits a graph: inserts values and replaces others with them. Nothing else may change a graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from surgery.common.errors import PassError
from surgery.graph.marks import (
    META,
    input_before_adapters,
    is_aux,
    mark_of,
    output_with_adapters,
    set_mark,
)
from surgery.graph.ops import LINEAR, Call, arguments, operand
from surgery.graph.outputs import same_size
from surgery.graph.propagate import propagate
from surgery.graph.rewrite.current import bias_now, replaced_by, swapped_op, weight_reader
from surgery.graph.rewrite.inserter import Inserter
from surgery.graph.sites import Site

aten = torch.ops.aten

# Names of version 0.1 -> current names. The old names work for one more version, with a warning.
_RENAMED = {
    "again": "call_op_on",
    "at": "at_call",
    "call_": "site_call",
    "exchange": "swap_tensor",
    "feed": "replace_argument",
    "go_on": "insert_after",
    "has_role": "set_role",
    "out": "output",
    "own": "op_output",
    "settle": "propagate_sizes",
    "stand_in": "replace_output",
}


class Rewriter(Inserter):
    """Edits the graph at one call of a site, for one pass: inserts values and replaces others with them.

    `x` is the input of the op, `output` the value that its users read now, earlier adapters included. For an op that
    computes W @ x, both are transposed, so that the features come last.
    """

    _ends: tuple[fx.Node, fx.Node]  # input and output of the op, as the graph has them
    _columns: bool  # the op is W @ x, whose features are next to last
    _turned: dict[fx.Node, fx.Node]

    def __getattr__(self, name: str) -> Any:
        new = _RENAMED.get(name)
        if new is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"Rewriter.{name} is now Rewriter.{new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    @cached_property
    def _swapped(self) -> dict[fx.Node, fx.Node]:
        """The replacement of each weight, made once for all calls that read it."""
        return {}

    # -- the values at a call

    @property
    def x(self) -> fx.Node:
        """The input of the op, before adapters that change it."""
        return self._features_last(self._ends[0])

    @property
    def output(self) -> fx.Node:
        """The value that users of the site's output read now, earlier adapters included."""
        return self._features_last(self._ends[1])

    @property
    def op_input(self) -> fx.Node:
        """The input that the op reads now, with adapters that change it."""
        return self._features_last(operand(self.site_call))

    @property
    def op_output(self) -> fx.Node:
        """The output of the op itself with its bias, without the adapters around it."""
        return self._features_last(swapped_op(self.site_call.node) or self.site_call.node)

    @property
    def bias(self) -> fx.Node | None:
        """The value that the op reads as its bias now; None if there is none."""
        return bias_now(self.site_call)

    @property
    def stored(self) -> fx.Node:
        """The weight that the op reads now, in its stored layout: the parameter, or what a pass replaced it with."""
        return weight_reader(self.site_call)[1]

    def call_op_on(self, x: fx.Node) -> fx.Node:
        """Insert the op itself on another input, with its bias."""
        node, op = self.site_call.node, self.site_call.op
        self._refuse_replaced(node)
        names = list(arguments(node))
        args = [x if name == op.x else value for name, value in zip(names, node.args, strict=False)]
        kwargs = {name: x if name == op.x else value for name, value in node.kwargs.items()}
        return self.call(node.target, *args, **kwargs)

    def _features_last(self, node: fx.Node) -> fx.Node:
        """The value with features on the last axis: transposed if the op computes W @ x."""
        if not self._columns:
            return node
        if node not in self._turned:
            with self.after(node):
                self._turned[node] = self.call(aten.transpose.int, node, -2, -1)
        return self._turned[node]

    # -- replacing values

    def wrap(self, node: fx.Node, build: Callable[[fx.Node], fx.Node], grown: bool = False) -> fx.Node:
        """Let the users of a node's value, with all adapters around it, read build(value) instead.

        Args:
            node: An op of the model.
            build: Function of the value that inserts nodes with `call` and returns the new value. The nodes that it
                inserts keep reading the old value.
            grown: The new value is larger than the op's own; earlier and later adapters of the op stay inside.
        """
        value = output_with_adapters(node, whole=grown)
        known = set(self._new)
        with self.after(value):
            fresh = build(value)
        if fresh is value:
            return value
        own = {n for n in self._new if n not in known}
        if grown:
            set_mark(fresh, grown=True)
        self._put(value, fresh, lambda user: user not in own)
        return fresh

    def replace_output(self, node: fx.Node, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Replace the value that a node itself computes by build(node); adapters around it act on the new value."""
        known = set(self._new)
        with self.after(node):
            fresh = build(node)
        own = {n for n in self._new if n not in known}
        self._put(node, fresh, lambda user: user not in own)
        return fresh

    def swap_op(self, build: Callable[[], fx.Node]) -> fx.Node:
        """Compute the output of the op with another op; adapters beneath and above act on the new value.

        Args:
            build: Function that inserts nodes with `call` and returns the new output, with the features last. It reads
                `op_input`, `bias` and tensors of the pass, and not `op_output`.

        Returns:
            The new output.

        Raises:
            PassError: The op was replaced already, or the new output has another shape or is computed from the old one.
        """
        node = self.site_call.node
        self._refuse_replaced(node)
        known = set(self._new)
        with self.after(node):
            fresh = build()
            if self._columns:
                fresh = self.call(aten.transpose.int, fresh, -2, -1)
        self._check_shape(fresh, node)
        own = {n for n in self._new if n not in known}
        if fresh not in own or any(node in n.all_input_nodes for n in own):
            raise PassError(
                f"{self._entry_id} at {self.site.path}: the new op must be computed from g.op_input and without the "
                "op that it replaces (g.op_output)"
            )
        set_mark(fresh, op_of=node.name)
        self._put(node, fresh, lambda user: user not in own)
        # The ends are those of the new op if nothing was around the old one.
        self._ends = self._ends[0], output_with_adapters(node)
        return fresh

    def _refuse_replaced(self, node: fx.Node) -> None:
        gone = replaced_by(node)
        if gone:
            raise PassError(f"{self._entry_id} at {self.site.path}: {gone} has put another op in its place")

    def replace_argument(
        self, user: fx.Node, where: int | str | fx.Node, build: Callable[[fx.Node], fx.Node]
    ) -> fx.Node:
        """Let one op of the model read build(value) instead of the value of an argument.

        Earlier adapters of the op read the new value too; all other users keep reading the old one. Later analysis
        treats the new value as the old one.

        Args:
            user: The op.
            where: Position or keyword of the argument, or the value itself.
            build: Function of the value that inserts nodes and returns the new value.
        """
        if isinstance(where, fx.Node):
            value = where
        else:
            value = user.args[where] if isinstance(where, int) else user.kwargs[where]  # type: ignore[assignment]
        with self.before(user):
            fresh = build(value)
        set_mark(fresh, feeds=value.name)
        if isinstance(where, int):
            user.update_arg(where, fresh)
        elif isinstance(where, str):
            user.update_kwarg(where, fresh)
        else:
            user.replace_input_with(value, fresh)
        for other in list(value.users):
            if other not in self._new and mark_of(other).call == user.name:
                other.replace_input_with(value, fresh)
        return fresh

    def insert_after(self, node: fx.Node, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Let the users of a node's value read build(value), which consists of ops like the model's own.

        Unlike with `wrap`, the new value is not an adapter of the node: later adapters of the node are inserted before
        it.
        """
        known = set(self._new)
        with self.after(node):
            fresh = build(node)
        own = {n for n in self._new if n not in known}
        set_mark(fresh, follows=node.name)
        node.replace_all_uses_with(fresh, delete_user_cb=lambda user: user not in own)
        return fresh

    def replace_input(self, build: Callable[[fx.Node], fx.Node], grown: bool = False) -> None:
        """Let the op and its earlier adapters read build(x) instead of x.

        Later adapters read x itself, as merging in journal order requires.

        Args:
            build: Function of x that inserts nodes with `call`. From the value that it returns, following the first
                argument of each node must lead back to x.
            grown: As in `wrap`; later adapters then read the new value too.
        """
        name = self.site_call.node.name
        x, turned = self._ends[0], self._turned
        if grown:
            x = input_before_adapters(operand(self.site_call), whole=True)
        readers = [
            n
            for n in x.users
            if n not in turned.values() and (n is self.site_call.node or mark_of(n).call == name)
        ]
        anchor, self._anchor = self._anchor, min(readers)
        known = set(self._new)
        self._turned = {}
        value = build(self._features_last(x))
        if self._columns:
            value = self.call(aten.transpose.int, value, -2, -1)
        self._anchor, self._turned = anchor, turned
        for node in self._new:
            if node not in known:
                set_mark(node, input=True, grown=grown or mark_of(node).grown)
        for reader in readers:
            reader.replace_input_with(x, value)

    def _put(self, value: fx.Node, fresh: fx.Node, moves: Callable[[fx.Node], bool]) -> None:
        """Let the users of `value` for which `moves` is true read `fresh` instead."""
        # Marked before the swap: `wraps` names the inner value, so that a later pass finds the outermost.
        set_mark(fresh, wraps=value.name)
        if fresh not in value.users:
            set_mark(value, wrapped_by=fresh.name)
        for user in value.users:
            # A value that made the output larger stays outermost: it wraps the new value now.
            if user is not fresh and mark_of(user).wraps == value.name and moves(user):
                set_mark(user, wraps=fresh.name)
        value.replace_all_uses_with(fresh, delete_user_cb=moves)

    # -- replacing ops for good

    def supersede(self, node: fx.Node, fresh: fx.Node, value: fx.Node | None = None) -> None:
        """Replace an op for good by an op made with `model_op`, which is the site from here on.

        Args:
            node: The op that is replaced. Adapters around it no longer have an effect, so a pass should refuse a site
                with adapters in `check`; see `current.adapted_by`.
            fresh: Its replacement.
            value: A later value that the replacement includes, such as the sum with a bias; its users read `fresh`.
        """
        value = output_with_adapters(node, whole=True) if value is None else value
        set_mark(fresh, instead_of=value.name)
        set_mark(node, gone_for=fresh.name)
        value.replace_all_uses_with(fresh, delete_user_cb=lambda user: user not in self._new)

    def replace(self, nodes: Sequence[fx.Node], values: Mapping[fx.Node, fx.Node]) -> None:
        """Replace several ops of the model by ops made with `model_op`, for good.

        Args:
            nodes: All ops that are replaced.
            values: Replaced op -> the new value, for each op that others read.
        """
        for node, fresh in values.items():
            self.supersede(node, fresh)
        *_, last = values.values()
        for node in nodes:
            mark = mark_of(node)
            set_mark(
                node,
                gone_for=mark.gone_for or last.name,
                at=mark.at or self.site.path,
                role=mark.role or self.view.seen_role(node) or None,
            )

    # -- other weights and sizes

    def swap_weight(self, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Let the calls of a site read build(weight) instead of their weight, in its stored layout.

        The value is inserted once for all calls. Site indexing, earlier adapters and later passes treat it as the
        parameter. Since it is the innermost value at its site, the Fold that merges it has `stage = Stage.WEIGHT`.

        Args:
            build: Function of the weight's value that returns a graph value of the same shape: one inserted with
                `call`, or one of `g[...]`.

        Returns:
            The new value.

        Raises:
            PassError: The weight is computed, or another op has replaced the site's.
        """
        call = self.site_call
        if call.weight is None:
            raise PassError(f"{self._entry_id} at {self.site.path}: its weight is computed, not stored")
        reader, current = weight_reader(call)
        return self._swap(reader, current, str(call.weight.target), build)

    def swap_bias(self, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Let the calls of a site read build(bias) instead of their bias; see `swap_weight`."""
        call, current = self.site_call, bias_now(self.site_call)
        if call.bias is None or current is None:
            raise PassError(
                f"{self._entry_id} at {self.site.path}: its op adds no bias that is a parameter; refuse it in `check`"
            )
        return self._swap(call.node, current, str(call.bias.target), build)

    def _swap(
        self, reader: fx.Node, current: fx.Node, parameter: str, build: Callable[[fx.Node], fx.Node]
    ) -> fx.Node:
        own = self.site_call.node
        self._refuse_replaced(own)
        # Earlier adapters that compute with the weight (with its norms, say) must see the same value as the op.
        readers = [reader, *(n for n in current.users if mark_of(n).call == own.name)]
        if current not in self._swapped:
            with self.before(min(readers)):
                value = build(current)
            set_mark(value, weight_of=parameter, wraps=current.name, call=own.name)
            self._swapped[current] = value
        for node in readers:
            node.replace_input_with(current, self._swapped[current])
        return self._swapped[current]

    def swap_tensor(self, node: fx.Node, name: str, reader: fx.Node | None = None) -> None:
        """Let the users of a tensor of the model read a tensor of the pass instead, for good; its size can differ.

        The ops stay; set the new sizes of later nodes with `resize`.

        Args:
            node: The tensor's node.
            name: Name of the new tensor in the pass.
            reader: The only user that reads the new tensor; None: all users.
        """
        fresh = self._attribute(name)
        set_mark(fresh, wraps=node.name, call=self.site_call.node.name)
        node.replace_all_uses_with(fresh, delete_user_cb=lambda user: reader is None or user is reader)

    def resize(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """Update the fake value of a node after a change of size, and its arguments if they contain sizes.

        Args:
            node: The node.
            args: Its arguments with the new sizes.
        """
        if str(args) != str(node.args):
            node.args = args
            node.meta = {**node.meta, META: replace(mark_of(node), resized=self._entry_id)}
        node.meta = {**node.meta, "val": self._cache.call(node.target, node.args, node.kwargs)}
        node.meta.pop("tensor_meta", None)

    def propagate_sizes(self, changed: Mapping[fx.Node, fx.Node]) -> None:
        """Update the sizes of all nodes after inserted ones; see surgery.graph.propagate.

        Args:
            changed: Inserted node -> the node that it replaced for its users.

        Raises:
            PassError: An op cannot take the new size.
        """
        try:
            done = propagate(self.graph, changed)
        except PassError as error:
            raise PassError(f"{self._entry_id}: {error}") from None
        own = self.site_call.node
        for node in done.created:
            mark = replace(self._provenance(), call=own.name)
            # A size belongs to the innermost module that holds both its source and its reader. The size of an input
            # belongs to the whole model.
            root = [*own.meta.get("nn_module_stack", {}).items()][:1]
            both = [
                n.meta.get("nn_module_stack", {}) for n in (node.all_input_nodes[0], next(iter(node.users)))
            ]
            stack = dict([item for item in both[0].items() if item in both[1].items()] or root)
            node.meta = {**node.meta, "nn_module_stack": stack, META: mark, "custom": self._custom()}
        for node in done.repaired:
            if not is_aux(node):
                set_mark(node, resized=self._entry_id)

    # -- moving from call to call, for the engine

    @contextlib.contextmanager
    def at_call(self, call: Call) -> Iterator[None]:
        """Context manager: `x`, `output`, `replace_input` and `call` refer to another call."""
        kept = self._call, self._ends, self._anchor, self._columns, self._turned
        self._call = call
        self._enter(call, columns=False)
        try:
            yield
        finally:
            self._call, self._ends, self._anchor, self._columns, self._turned = kept

    def rewrite(self, site: Site, build: Any) -> None:
        """Call build(site, self) at every call of a site and replace the output by the value that it returns."""
        self._site, self._attributes = site, {}
        for call in site.calls:
            self._call = call
            self._enter(call, columns=call.kind == LINEAR and call.x_axis == "column")
            self._new = {}
            value = build(site, self)
            if value is None or value is self._ends[1] or value is self._turned.get(self._ends[1]):
                continue
            if not isinstance(value, fx.Node):
                raise PassError(
                    f"{self._entry_id} at {site.path}: rewrite must return a graph value, got {value!r}"
                )
            if self._columns:
                value = self.call(aten.transpose.int, value, -2, -1)
            self._check_shape(value, self._ends[1])
            self._put(self._ends[1], value, lambda node: node not in self._new)

    def _check_shape(self, value: fx.Node, output: fx.Node) -> None:
        """Raises PassError if `rewrite` returned a value of another shape than the output that it replaces."""
        made, wanted = (tuple(node.meta["val"].shape) for node in (value, output))
        if len(made) != len(wanted) or not all(map(same_size, made, wanted)):
            said, asked = (" × ".join(map(str, shape)) for shape in (made, wanted))
            raise PassError(
                f"{self._entry_id} at {self.site.path}: rewrite returned a value of shape {said}, and the output that "
                f"it replaces has shape {asked}; return a value of the output's shape"
            )

    def rewrite_once(self, site: Site, build: Any) -> None:
        """Call build(site, self) once for a place of the whole program; it puts values in place itself."""
        self._site, self._attributes, self._new = site, {}, {}
        self._call = site.calls[0]
        self._enter(self._call, columns=False)
        build(site, self)

    def _enter(self, call: Call, columns: bool) -> None:
        # Read from the graph, not from the call: an earlier site may have been rewritten since the call was indexed.
        self._ends = input_before_adapters(operand(call)), output_with_adapters(call.node)
        self._anchor = self._ends[1].next
        self._columns, self._turned = columns, {}
