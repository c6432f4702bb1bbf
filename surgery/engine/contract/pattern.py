"""Passes whose places are matches of a pattern: several ops of the model become others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from surgery.engine.contract.base import GraphPass
from surgery.engine.contract.effect import SWAP, Effect
from surgery.graph.marks import mark_of
from surgery.graph.ops import Call, WeightOp, arguments, module_path
from surgery.graph.patterns import Found, Match, NearMiss, Pattern, find, value
from surgery.graph.patterns.expressions import Value
from surgery.graph.rewrite.current import adapted_by
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site, SiteKey

if TYPE_CHECKING:
    from surgery.graph.view import View


# What stands on weights as they are: it comes behind a pass that makes other weights of them.
ADAPTERS = ("lora", "ia3", "sparse-tune", "bitfit", "quantize", "low-rank")


@dataclass(frozen=True)
class _Places:
    found: Found
    sites: tuple[Site, ...]
    matches: Mapping[SiteKey, Match]


class PatternPass(GraphPass):
    """A pass that puts other ops in the place of those that a pattern matches.

    A place is keyed to a module's path (`path_of`: the anchor's), and to its number there. `patterns` gives the
    pattern, or several; `replacement` makes the new value of each output, with `g.model_op`. on: the kind of place,
    one name. role: what targets and plans call it. What is matched stays in the graph, unread, for undo and for the
    numbers of places; later passes see the new ops.
    """

    role: ClassVar[str] = ""

    @property
    def effect(self) -> Effect:
        return replace(SWAP, one_layer=False)

    def patterns(self, view: View) -> Sequence[Pattern]:
        """What to look for; where two match the same ops, the first counts."""
        raise NotImplementedError

    def replacement(self, site: Site, match: Match, g: Rewriter) -> fx.Node | Sequence[fx.Node]:
        """The values that are read in the place of the outputs, in their order, made with `g.model_op`."""
        raise NotImplementedError

    # -- places

    def _places(self, view: View) -> _Places:
        return view.once(self.model_copy(update={"target": None, "label": ""}), lambda: self._find(view))

    def path_of(self, match: Match) -> str:
        """Path of the module that a match belongs to."""
        return match.path

    def _find(self, view: View) -> _Places:
        found = find(view.ops_index, *self.patterns(view))
        numbers: dict[str, int] = defaultdict(int)
        sites, matches = [], {}
        for match in found.matches:
            path = self.path_of(match)
            key = SiteKey(path, self.on[0], numbers[path])
            numbers[path] += 1
            sites.append(self._site(key, match))
            matches[key] = match
        return _Places(found, tuple(sites), matches)

    def _site(self, key: SiteKey, match: Match) -> Site:
        owner, (kind,) = key.owner, self.on
        path = ".".join(
            part for part in (owner, f"{kind}_{key.ordinal}" if key.ordinal or not owner else "") if part
        )
        value = match.outputs[0].meta["val"]
        calls = tuple(_call(node, kind) for node in match.outputs)
        shape = tuple(value.shape)
        return Site(key, path, kind, calls, None, None, shape, value.dtype, "", self.role)

    def match(self, site: Site, view: View) -> Match:
        """The match that a site is."""
        return self._places(view).matches[site.key]

    def misses(self, view: View) -> tuple[NearMiss, ...]:
        """Where the patterns nearly are, and why they are not."""
        return self._places(view).found.misses

    def candidates(self, view: View) -> list[Site]:
        return list(self._places(view).sites)

    def no_match_message(self, view: View) -> str:
        """The message where the pattern is found nowhere, with the place where it nearly is."""
        misses = self.misses(view)
        if not misses:
            return "its pattern is nowhere in this model"
        nearest = max(misses, key=lambda miss: miss.matched)
        others = f" and at {len(misses) - 1} other places" if len(misses) > 1 else ""
        return (
            f"its pattern is nowhere in this model; nearly at {nearest.path or nearest.anchor.name}: {nearest}"
            f"{others} (surgery plan --why lists them)"
        )

    # -- one place

    def check(self, site: Site) -> str | None:
        entry = next((entry for entry in map(adapted_by, site.calls) if entry), None)
        if entry:
            return (
                f"it carries {entry!r}, which was made for the op as it is; {self.name} first and adapt then"
            )
        return None

    def rewrite(self, site: Site, g: Rewriter) -> None:
        match = self.match(site, g.view)
        first = min(match.outputs, key=g.view.ops_index.order.__getitem__)
        with g.after(first):
            made = self.replacement(site, match, g)
        values = [made] if isinstance(made, fx.Node) else list(made)
        g.replace(match.nodes, dict(zip(match.outputs, values, strict=True)))


def role_in(view: View, node: fx.Node) -> str:
    """The role of a weight op, or the one that it had before a pass replaced it."""
    return view.roles.role.get(node) or str(mark_of(node).role)


def is_stored(node: fx.Node) -> bool:
    """Whether a value is a parameter or a buffer as it is."""
    return node.op == "get_attr"


def stored(name: str) -> Value:
    """Capture a parameter or a buffer."""
    return value(name, is_stored, "a stored tensor")


def read_elsewhere(match: Match, view: View, names: Sequence[str]) -> str | None:
    """Why tensors that a match captured cannot go: the reason where another op reads one too, or None."""
    for name in names:
        node = match.get(name)
        if node is None:
            continue
        aliases = view.names.get(str(node.target), (str(node.target),))
        readers = (
            user for alias in aliases for n in view.ops_index.stored.get(alias, ()) for user in n.users
        )
        if any(user in view.ops_index.live and user not in match.nodes for user in readers):
            return f"{node.target} is read in another place too; give this one a copy with --pass untie first"
    return None


def _call(node: fx.Node, kind: str) -> Call:
    """An output of a match, as the op of a site: of its first tensor."""
    x = next(name for name, value in arguments(node).items() if isinstance(value, fx.Node))
    op = WeightOp(kind, x, (x,), None, "")
    return Call(node, op, kind, node.all_input_nodes[0], None, "", computed_from=(module_path(node),))
