"""Embedding: only what takes the input in trains."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import fx

from surgery.common.errors import PassError
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection
from surgery.graph.analysis.dataflow import Rule, op_name, rule_of

_ROLES = {
    "token": ("embed.token", "embed"),
    "position": ("embed.position",),
    "type": ("embed.type",),
    "patch": ("embed.patch",),
}


class Embedding(SelectPass):
    """Train the embeddings alone: the tables of tokens, positions and types, patch embeddings, learned tokens.

    `--which token|position|type|patch` takes one kind of them, by role. Learned positions and class tokens that are
    added or joined on as they are (ViT) have no role: these are `position` if they have a row for each place, else
    `token`. `--which stem` is all that stands before the first block, convolutions and norms included; `all`, the
    default, is every kind, or the stem where a model has no embeddings (a ResNet, wav2vec2). A new head trains
    too. Token embeddings that are tied to the output layer train with it. Outputs do not change. Training the
    embeddings of a frozen model is how it is taken to a new vocabulary (Artetxe et al. 2020, arXiv:1910.11856).
    """

    name: ClassVar[str] = "embedding"
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    which: Literal["all", "token", "position", "type", "patch", "stem"] = Field(
        "all", description="kind of embedding: token, position, type, patch; stem: all before the first block"
    )

    def selection(self, candidates: Candidates) -> Selection:
        kinds = self._kinds(candidates)
        if self.which == "stem" or (self.which == "all" and not kinds):
            found = {n for n, deep in candidates.depth.items() if deep == 0}
        else:
            found = {n for n, kind in kinds.items() if self.which in ("all", kind)}
        chosen = found & set(candidates.targeted)
        if not chosen:
            there = (
                ", ".join(sorted(set(kinds.values())))
                or "none; --which stem is what stands before its blocks"
            )
            raise PassError(
                f"embedding: the model has no {self.which} embeddings among what is targeted; it has {there}"
            )
        return Selection(candidates.only(chosen | set(candidates.fresh)))

    def _kinds(self, candidates: Candidates) -> dict[str, str]:
        """Kind of embedding by parameter name."""
        found = {
            name: kind
            for name, roles in candidates.roles.items()
            for kind, own in _ROLES.items()
            if not set(own).isdisjoint(roles)
        }
        for name in map(candidates.first, _values(candidates.program.graph)):
            if candidates.depth.get(name) == 0 and name not in candidates.sites:
                rows = candidates.shape(name)[:-1]
                if rows:  # a vector is a bias
                    found.setdefault(name, "position" if max(rows) > 1 else "token")
        return found


def _values(graph: fx.Graph) -> set[str]:
    """Names of tensors that are added to a value, or joined to one, as they are."""
    found = set()
    for node in graph.nodes:
        stack = [node] if node.op == "get_attr" else []
        while stack:
            for user in stack.pop().users:
                name = op_name(user.target)
                if name in ("add", "cat"):
                    found.add(str(node.target))
                elif rule_of(user.target) is Rule.FIRST or name.startswith("upsample"):
                    stack.append(user)
    return found
