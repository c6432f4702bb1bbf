"""Pattern passes: replace the ops that a pattern matches by other ops."""

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


# Passes that act on existing weights. A pass that replaces these weights by others must come before them.
ADAPTERS = ("lora", "ia3", "sparse-tune", "bitfit", "quantize", "low-rank")


@dataclass(frozen=True)
class _Places:
    """Matches of a pass's patterns in one graph, with a site for each."""

    found: Found
    sites: tuple[Site, ...]
    matches: Mapping[SiteKey, Match]


class PatternPass(GraphPass):
    """A pass that replaces the ops that a pattern matches.

    A subclass defines `patterns` and `replacement`. The key of a match is the path of its module (see `path_of`) and
    its number there. The matched ops stay in the graph without users, so that the numbers of other matches do not
    change; later passes see the new ops.

    Attributes:
        on: Kind of place, a single name.
        role: Role of the places in targets and plans.
    """

    role: ClassVar[str] = ""

    @property
    def effect(self) -> Effect:
        """Effect of the pass; it replaces ops of more than one layer by default."""
        return replace(SWAP, one_layer=False)

    def patterns(self, view: View) -> Sequence[Pattern]:
        """Patterns to match. If two patterns match the same ops, the first one wins."""
        raise NotImplementedError

    def replacement(self, site: Site, match: Match, g: Rewriter) -> fx.Node | Sequence[fx.Node]:
        """Insert the new ops of a match with `g.model_op`.

        Args:
            site: The site of the match.
            match: The match, with its captured values.
            g: Editor of the graph.

        Returns:
            The new value of each output of the match, in their order.
        """
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
        """The match of a site in a graph."""
        return self._places(view).matches[site.key]

    def misses(self, view: View) -> tuple[NearMiss, ...]:
        """Places that nearly match a pattern, with the reason why they do not."""
        return self._places(view).found.misses

    def candidates(self, view: View) -> list[Site]:
        """A site for every match."""
        return list(self._places(view).sites)

    def no_match_message(self, view: View) -> str:
        """Message for a program without a match; it names the nearest miss."""
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
        """Reason to refuse a match with an adapter on one of its ops, or None."""
        entry = next((entry for entry in map(adapted_by, site.calls) if entry), None)
        if entry:
            return (
                f"it carries {entry!r}, which was made for the original op; apply {self.name} before adapters"
            )
        return None

    def rewrite(self, site: Site, g: Rewriter) -> None:
        """Replace the ops of one match."""
        match = self.match(site, g.view)
        first = min(match.outputs, key=g.view.ops_index.order.__getitem__)
        with g.after(first):
            made = self.replacement(site, match, g)
        values = [made] if isinstance(made, fx.Node) else list(made)
        g.replace(match.nodes, dict(zip(match.outputs, values, strict=True)))


def role_in(view: View, node: fx.Node) -> str:
    """Role of a weight op; of a replaced op, the role that it had before."""
    return view.roles.role.get(node) or str(mark_of(node).role)


def is_stored(node: fx.Node) -> bool:
    """True if a value is a parameter or a buffer itself, not computed from one."""
    return node.op == "get_attr"


def stored(name: str) -> Value:
    """Pattern that matches a parameter or a buffer and captures it under a name."""
    return value(name, is_stored, "a stored tensor")


def read_elsewhere(match: Match, view: View, names: Sequence[str]) -> str | None:
    """Reason why captured tensors of a match cannot be replaced because another op reads one, or None.

    Args:
        match: The match.
        view: Analysis of the graph.
        names: Names of captured values that are tensors of the model.
    """
    called: dict[str, str] = {}
    for name in names:
        node = match.get(name)
        if node is None:
            continue
        aliases = view.names.get(str(node.target), (str(node.target),))
        readers = [
            user for alias in aliases for n in view.ops_index.stored.get(alias, ()) for user in n.users
        ]
        others = {user for user in readers if user in view.ops_index.live and user not in match.nodes}
        own = _calls_of(view, [user for user in readers if user in match.nodes])
        if others - own.keys():
            return f"{node.target} is read in another place too; give this one a copy with --pass untie first"
        if others:
            called.setdefault(next(iter(own.values())), str(node.target))
    if called:
        return (
            f"{next(iter(called.values()))} serves several calls of its layer; give each call its own copy with --pass "
            f"untie --calls --target {','.join(called)} first"
        )
    return None


def _calls_of(view: View, nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """All calls of the layers that some ops are calls of: op -> path of the layer."""
    sites = [view.site_of(node) for node in nodes if node in {call.node for call in view.calls}]
    return {call.node: site.path for site in sites for call in site.calls}


def _call(node: fx.Node, kind: str) -> Call:
    """An output of a match as the call of a site; its first tensor argument counts as the input."""
    x = next(name for name, value in arguments(node).items() if isinstance(value, fx.Node))
    op = WeightOp(kind, x, (x,), None, "")
    return Call(node, op, kind, node.all_input_nodes[0], None, "", computed_from=(module_path(node),))
