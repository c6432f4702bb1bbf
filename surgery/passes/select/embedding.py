"""embedding: trains only the embeddings, or all layers before the first block."""

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
    """Embedding training: only token, position, type and patch embeddings and learned tokens train.

    `--which` chooses one kind: `token`, `position`, `type` or `patch`, found by role. Learned positions and class
    tokens that are added or concatenated directly (ViT) have no role. They count as `position` if they have more than
    one row, otherwise as `token`. `--which stem` is everything before the first block, including convolutions and
    norms. `all`, the default, is every kind of embedding, or the stem if the model has none (ResNet, wav2vec2).

    Parameters that the checkpoint did not contain, such as a new head, train too. Token embeddings that are tied to the
    output layer train with it. Applying the pass does not change the outputs. Training only the embeddings adapts a
    frozen model to a new vocabulary (Artetxe et al. 2020, arXiv:1910.11856).
    """

    name: ClassVar[str] = "embedding"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass embedding "
        "-o tables/"
    )
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    which: Literal["all", "token", "position", "type", "patch", "stem"] = Field(
        default="all",
        description="kind of embedding: token, position, type, patch; stem: all layers before the first block",
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
                or "none; use --which stem for the layers before its blocks"
            )
            raise PassError(
                f"embedding: the model has no {self.which} embeddings among the targeted parameters; it has {there}"
            )
        return Selection(candidates.only(chosen | set(candidates.fresh)))

    def _kinds(self, candidates: Candidates) -> dict[str, str]:
        """Return the kind of embedding by parameter name."""
        found = {
            name: kind
            for name, roles in candidates.roles.items()
            for kind, own in _ROLES.items()
            if not set(own).isdisjoint(roles)
        }
        for name in map(candidates.first, _values(candidates.program.graph)):
            if candidates.depth.get(name) == 0 and name not in candidates.sites:
                rows = candidates.shape(name)[:-1]
                # A vector is a bias, not an embedding.
                if rows:
                    found.setdefault(name, "position" if max(rows) > 1 else "token")
        return found


def _values(graph: fx.Graph) -> set[str]:
    """Return the names of tensors that are added or concatenated to another value, up to views and resizing."""
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
