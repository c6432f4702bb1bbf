"""The one thing that changes a graph: it puts values that are inserted in the place of others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from surgery.common.errors import PassError
from surgery.graph.marks import META, head, is_aux, tail
from surgery.graph.ops import LINEAR, Call, arguments, operand
from surgery.graph.propagate import propagate
from surgery.graph.rewrite.current import bias_now, replaced_by, weight_reader
from surgery.graph.rewrite.inserter import Inserter
from surgery.graph.sites import Site

aten = torch.ops.aten


class Rewriter(Inserter):
    """Puts what it inserts for one pass in its place at one call of a site.

    `x` is the activation that enters the op, `out` the value that its users see now (earlier adapters
    included); of an op that computes W @ x both are shown transposed, features last.
    """

    _ends: tuple[fx.Node, fx.Node]  # what enters and leaves the op, as the graph has them
    _columns: bool  # the op is W @ x: features are next to last there
    _turned: dict[fx.Node, fx.Node]

    @cached_property
    def _swapped(self) -> dict[fx.Node, fx.Node]:
        """What stands in the place of a weight, made once for all that read it."""
        return {}

    @property
    def x(self) -> fx.Node:
        """The activation that enters the op."""
        return self._features_last(self._ends[0])

    @property
    def out(self) -> fx.Node:
        """The value that users of the site's output see now."""
        return self._features_last(self._ends[1])

    @property
    def own(self) -> fx.Node:
        """What the op itself computes, without the adapters round it (with its bias, of what enters it now)."""
        assert self.call_ is not None
        return self._features_last(self.call_.node)

    @property
    def stored(self) -> fx.Node:
        """The weight that the op reads now, in its stored layout: the parameter, or what a pass put in its place."""
        assert self.call_ is not None
        return weight_reader(self.call_)[1]

    def again(self, x: fx.Node) -> fx.Node:
        """What the op itself computes of another activation, with its bias."""
        assert self.call_ is not None
        node, op = self.call_.node, self.call_.op
        names = list(arguments(node))
        args = [x if name == op.x else value for name, value in zip(names, node.args, strict=False)]
        kwargs = {name: x if name == op.x else value for name, value in node.kwargs.items()}
        return self.call(node.target, *args, **kwargs)

    def _features_last(self, node: fx.Node) -> fx.Node:
        if not self._columns:
            return node
        if node not in self._turned:
            with self.after(node):
                self._turned[node] = self.call(aten.transpose.int, node, -2, -1)
        return self._turned[node]

    def rewrite_once(self, site: Site, build: Any) -> None:
        """Call build(site, self) once for a place of the whole program; it puts values in place with `wrap`."""
        self.site, self._attributes, self._new = site, {}, {}
        self.call_ = site.calls[0]
        self._enter(self.call_, columns=False)
        build(site, self)

    def wrap(self, node: fx.Node, build: Callable[[fx.Node], fx.Node], grown: bool = False) -> fx.Node:
        """Put build(value) in the place of a node's value, which is that of the last adapter round it.

        build inserts with `call`, after that value. Its users see the new value, what build inserted sees the old.
        grown: build makes it larger than the op's own; earlier and later adapters of the op stay inside of it.
        """
        value = tail(node, whole=grown)
        known = set(self._new)
        with self.after(value):
            fresh = build(value)
        if fresh is value:
            return value
        own = {n for n in self._new if n not in known}
        if grown:
            fresh.meta[META] = {**fresh.meta[META], "grown": True}
        self._put(value, fresh, lambda user: user not in own)
        return fresh

    def stand_in(self, node: fx.Node, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Put build(node) in the place of what a node itself computes: adapters round it stand round that then."""
        known = set(self._new)
        with self.after(node):
            fresh = build(node)
        own = {n for n in self._new if n not in known}
        self._put(node, fresh, lambda user: user not in own)
        return fresh

    def feed(self, user: fx.Node, where: int | str | fx.Node, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Let one op of the model read build(value) in the place of an argument's value, which others still read.

        where: position or keyword of the argument, or the value itself. Earlier adapters of the op read it too. For
        the analysis that later passes see, what build returns stands for the value.
        """
        if isinstance(where, fx.Node):
            value = where
        else:
            value = user.args[where] if isinstance(where, int) else user.kwargs[where]  # type: ignore[assignment]
        with self.before(user):
            fresh = build(value)
        fresh.meta[META] = {**fresh.meta[META], "feeds": value.name}
        if isinstance(where, int):
            user.update_arg(where, fresh)
        elif isinstance(where, str):
            user.update_kwarg(where, fresh)
        else:
            user.replace_input_with(value, fresh)
        for other in list(value.users):
            if other not in self._new and other.meta.get(META, {}).get("call") == user.name:
                other.replace_input_with(value, fresh)
        return fresh

    def settle(self, changed: Mapping[fx.Node, fx.Node]) -> None:
        """Give what lies behind inserted nodes its new sizes; see surgery.graph.propagate. changed: node -> whose place
        it took."""
        try:
            done = propagate(self.graph, changed)
        except PassError as error:
            raise PassError(f"{self._entry_id}: {error}") from None
        assert self.call_ is not None
        for node in done.created:
            mark = {**self._provenance(), "call": self.call_.node.name}
            # It stands beside the size that it is computed from: in the innermost module that holds both that and
            # what reads it. An input's size is in none.
            root = [*self.call_.node.meta.get("nn_module_stack", {}).items()][:1]
            both = [
                n.meta.get("nn_module_stack", {}) for n in (node.all_input_nodes[0], next(iter(node.users)))
            ]
            stack = dict([item for item in both[0].items() if item in both[1].items()] or root)
            node.meta = {**node.meta, "nn_module_stack": stack, META: mark, "custom": self._custom()}
        for node in done.repaired:
            if not is_aux(node):
                node.meta[META] = {**node.meta.get(META, {}), "resized": self._entry_id}

    def supersede(self, node: fx.Node, fresh: fx.Node, value: fx.Node | None = None) -> None:
        """Let the users of a node's value read fresh for good: an op made with `model_op`, which is the site now.

        value: one behind it, where that goes with the node (a bias added to it). Adapters round it are dead then;
        refuse them in `check` (see surgery.graph.rewrite.current.adapted_by).
        """
        value = tail(node, whole=True) if value is None else value
        fresh.meta[META] = {**fresh.meta[META], "instead_of": value.name}
        node.meta[META] = {**node.meta.get(META, {}), "gone_for": fresh.name}
        value.replace_all_uses_with(fresh, delete_user_cb=lambda user: user not in self._new)

    def replace(self, nodes: Sequence[fx.Node], values: Mapping[fx.Node, fx.Node]) -> None:
        """Put ops made with `model_op` in the place of several of the model's, for good.

        nodes: what goes. values: for those of them that others read, what is read in their place.
        """
        for node, fresh in values.items():
            self.supersede(node, fresh)
        assert self.site is not None
        *_, last = values.values()
        for node in nodes:
            role = self.view.seen_role(node)
            known = {"at": self.site.path, **({"role": role} if role else {})}
            node.meta[META] = {"gone_for": last.name, **known, **node.meta.get(META, {})}

    def go_on(self, node: fx.Node, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Let the users of a node's value read build(value), made by ops of the model's kind that follow on it.

        Unlike what `wrap` puts round an op, it is none of that op's: adapters of the op stand before it.
        """
        known = set(self._new)
        with self.after(node):
            fresh = build(node)
        own = {n for n in self._new if n not in known}
        fresh.meta[META] = {**fresh.meta[META], "follows": node.name}
        node.replace_all_uses_with(fresh, delete_user_cb=lambda user: user not in own)
        return fresh

    def resize(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """Give a node of the model, behind a value of another size, its own new `val`; args: with sizes mended."""
        if str(args) != str(node.args):
            node.args = args
            node.meta = {**node.meta, META: {**node.meta.get(META, {}), "resized": self._entry_id}}
        node.meta = {**node.meta, "val": self._cache.call(node.target, node.args, node.kwargs)}
        node.meta.pop("tensor_meta", None)

    def exchange(self, node: fx.Node, name: str) -> None:
        """Let all that reads a tensor of the model read one of the pass's, of another size, for good.

        The ops stay; those behind it are given their sizes with `resize`.
        """
        assert self.call_ is not None
        fresh = self._attribute(name)
        fresh.meta[META] = {**fresh.meta[META], "wraps": node.name, "call": self.call_.node.name}
        node.replace_all_uses_with(fresh)

    @contextlib.contextmanager
    def at(self, call: Call) -> Iterator[None]:
        """Stand at another call while the block runs: `x`, `out`, `replace_input` and what `call` inserts are its."""
        kept = self.call_, self._ends, self._anchor, self._columns, self._turned
        self.call_ = call
        self._enter(call, columns=False)
        try:
            yield
        finally:
            self.call_, self._ends, self._anchor, self._columns, self._turned = kept

    def _put(self, value: fx.Node, fresh: fx.Node, moves: Callable[[fx.Node], bool]) -> None:
        assert self.site is not None
        # Before the swap: `wraps` names the inner value, so that a later pass finds the outermost.
        fresh.meta[META] = {**fresh.meta[META], "wraps": value.name}
        if fresh not in value.users:
            value.meta[META] = {**value.meta.get(META, {}), "wrapped_by": fresh.name}
        for user in value.users:
            if user is not fresh and user.meta.get(META, {}).get("wraps") == value.name and moves(user):
                user.meta[META] = {
                    **user.meta[META],
                    "wraps": fresh.name,
                }  # what grew the output stays outside
        value.replace_all_uses_with(fresh, delete_user_cb=moves)

    def swap_weight(self, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Let the site's calls read build(weight) in the place of their weight, as stored; made once for a site.

        build returns a graph value of the weight's shape: inserted with `call`, or one of `g[...]`. For the
        sites' index, earlier adapters and later passes it stands for the parameter: it is innermost at its site,
        so the MergeOp that folds it has `inner = True`. Returns the value.
        """
        assert self.call_ is not None
        assert self.site is not None
        call = self.call_
        if call.weight is None:
            raise PassError(f"{self._entry_id} at {self.site.path}: its weight is computed, not stored")
        reader, current = weight_reader(call)
        return self._swap(reader, current, str(call.weight.target), build)

    def swap_bias(self, build: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The same for the bias that the site's op itself adds."""
        assert self.call_ is not None
        assert self.site is not None
        call, current = self.call_, bias_now(self.call_)
        if call.bias is None or current is None:
            raise PassError(f"{self._entry_id} at {self.site.path}: its op adds no bias that is a parameter")
        return self._swap(call.node, current, str(call.bias.target), build)

    def _swap(
        self, reader: fx.Node, current: fx.Node, parameter: str, build: Callable[[fx.Node], fx.Node]
    ) -> fx.Node:
        assert self.call_ is not None
        assert self.site is not None
        gone = replaced_by(self.call_.node)
        if gone:
            raise PassError(f"{self._entry_id} at {self.site.path}: {gone} has put another op in its place")
        # Earlier adapters that compute with the weight (its norms, say) have to see the same as the op.
        name = self.call_.node.name
        readers = [reader, *(n for n in current.users if n.meta.get(META, {}).get("call") == name)]
        if current not in self._swapped:
            with self.before(min(readers)):
                value = build(current)
            mark = {"weight_of": parameter, "wraps": current.name, "call": self.call_.node.name}
            value.meta[META] = {**value.meta[META], **mark}
            self._swapped[current] = value
        for node in readers:
            node.replace_input_with(current, self._swapped[current])
        return self._swapped[current]

    def rewrite(self, site: Site, build: Any) -> None:
        """Call build(site, self) at every call of the site and put what it returns in the output's place."""
        self.site, self._attributes = site, {}
        for call in site.calls:
            self.call_ = call
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
            self._put(self._ends[1], value, lambda node: node not in self._new)

    def _enter(self, call: Call, columns: bool) -> None:
        # Read now, not from the call: a site before this one may have been rewritten since it was indexed.
        self._ends = head(operand(call)), tail(call.node)
        self._anchor = self._ends[1].next
        self._columns, self._turned = columns, {}

    def replace_input(self, build: Callable[[fx.Node], fx.Node], grown: bool = False) -> None:
        """Let all that stands at this site, op and earlier adapters, read build(x) in the place of x.

        build inserts all that it needs with `call`; from what it returns, first arguments must lead back to x.
        Later adapters still read x itself, so that folding in journal order is right; with `grown` (see `wrap`)
        they too read what was put there.
        """
        assert self.call_ is not None
        name = self.call_.node.name
        x, turned = self._ends[0], self._turned
        if grown:
            x = head(operand(self.call_), whole=True)
        readers = [
            n
            for n in x.users
            if n not in turned.values() and (n is self.call_.node or n.meta.get(META, {}).get("call") == name)
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
                node.meta[META] = {**node.meta[META], "input": True, **({"grown": True} if grown else {})}
        for reader in readers:
            reader.replace_input_with(x, value)
