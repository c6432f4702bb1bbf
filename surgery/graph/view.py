"""View: the analysis of a graph for passes, with sites, roles, attentions, residual branches and repeated blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from functools import cached_property
from typing import Any

from torch import fx

from surgery.graph.analysis.biases import site_biases
from surgery.graph.analysis.blocks import Block, Branch, find_blocks, find_branches
from surgery.graph.analysis.dataflow import Dataflow, trace_origins
from surgery.graph.analysis.depth import depth_of
from surgery.graph.analysis.roles import Attention, Roles, find_roles
from surgery.graph.marks import is_aux, is_superseded
from surgery.graph.ops import Call, WeightOp, find_calls
from surgery.graph.patterns.index import OpIndex
from surgery.graph.sites import Site, SiteIndex, SiteKey


class View:
    """Analysis of one graph, computed on demand. It looks through nodes that adapters inserted.

    Args:
        graph: The graph.
        names: Parameter name -> all names of that tensor.
        ops: Ops that hold a weight.
        training: True if the graph was traced in train mode.
        known: Roles and parts by site, if they were found before adapters were inserted.
    """

    def __init__(
        self,
        graph: fx.Graph,
        names: Mapping[str, tuple[str, ...]],
        ops: Mapping[Any, WeightOp],
        *,
        training: bool = False,
        known: tuple[
            Mapping[SiteKey, str], Mapping[SiteKey, Mapping[str, tuple[int, ...]]], Collection[SiteKey]
        ]
        | None = None,
    ) -> None:
        self.graph, self.names, self.ops, self.training = graph, names, ops, training
        self._known = known
        self._made: dict[Hashable, Any] = {}

    @cached_property
    def calls(self) -> list[Call]:
        """All calls of ops that hold a weight, in graph order."""
        nodes = [node for node in self.graph.nodes if not is_aux(node) and not is_superseded(node)]
        return find_calls(nodes, self.ops, lambda node: node.target in self.names)

    @cached_property
    def flow(self) -> Dataflow:
        """Dataflow of the graph: for each value, the weight ops that it comes from."""
        return trace_origins(self.graph.nodes, self.calls)

    @cached_property
    def roles(self) -> Roles:
        """Roles of weight ops, and the attentions they belong to."""
        return find_roles(self.graph, self.calls, self.flow)

    def seen_role(self, node: fx.Node) -> str:
        """Role of a weight op if roles have been computed already, else ""; a graph under edit is not analyzed."""
        return self.roles.role.get(node, "") if "roles" in self.__dict__ else ""

    @property
    def attentions(self) -> list[Attention]:
        """Attentions of the graph."""
        return self.roles.attentions

    @cached_property
    def sites(self) -> SiteIndex:
        """Every use of a weight, with its role."""
        if self._known is not None:
            return SiteIndex(self.graph, self.names, self.ops, *self._known)
        bare = SiteIndex(self.graph, self.names, self.ops)
        role, parts = self.roles.role, self.roles.parts
        by_role: dict[SiteKey, str] = {}
        by_parts: dict[SiteKey, Mapping[str, tuple[int, ...]]] = {}
        for site in bare:
            by_role[site.key] = next((role[c.node] for c in site.calls if c.node in role), "")
            by_parts[site.key] = next((parts[c.node] for c in site.calls if c.node in parts), {})
        crossing = self.roles.crossing
        cross = {site.key for site in bare if all(call.node in crossing for call in site.calls)}
        return SiteIndex(self.graph, self.names, self.ops, by_role, by_parts, cross)

    @cached_property
    def _site_by_node(self) -> dict[fx.Node, Site]:
        return {call.node: site for site in self.sites for call in site.calls}

    def site_of(self, node: fx.Node) -> Site:
        """The site that a node is a call of; KeyError if it is of none."""
        return self._site_by_node[node]

    @cached_property
    def branches(self) -> list[Branch]:
        """Residual branches in graph order."""
        return find_branches(self.graph, self.calls, self.flow, self.roles)

    @cached_property
    def blocks(self) -> list[tuple[Block, ...]]:
        """Rows of repeated blocks in graph order."""
        return find_blocks(self.graph, self.calls, self.flow, self.branches)

    @cached_property
    def depth(self) -> dict[str, int]:
        """Depth by parameter name: 0 before the first block, then the number of the block, one more after the last."""
        return depth_of(self.graph, self.calls, self.blocks)

    @cached_property
    def biases(self) -> dict[SiteKey, list[str]]:
        """Names of the parameters that are added as biases, by site."""
        return site_biases(self.graph, self.names, self.sites, self.flow)

    @cached_property
    def ops_index(self) -> OpIndex:
        """Nodes by op, for matching patterns."""
        return OpIndex(self.graph)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Result of make(), cached under the key, for findings that a pass needs at each of its sites.

        Args:
            key: Key of the value.
            make: Function that computes it.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def node(self, name: str) -> fx.Node:
        """The node of a name; KeyError if there is none."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.nodes}
