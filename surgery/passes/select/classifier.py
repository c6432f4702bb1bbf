"""Classifier: only the head trains, the classic linear probe on frozen features."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from surgery.common.errors import PassError
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection


class Classifier(SelectPass):
    """Train the head alone: y = V f(x) + c with f frozen, linear probing (Alain & Bengio 2016, arXiv:1610.01644).

    The head is what feeds an output of the model (role `head`), by dataflow; with `--dense` also what feeds only
    the head (role `head.dense`: BERT's pooler, RoBERTa's dense layer). What the checkpoint did not hold trains too,
    wherever it stands, since a random layer below the head would otherwise stay random. A language model's head that
    is tied to the token embeddings trains with them: they are one tensor. Outputs do not change.
    """

    name: ClassVar[str] = "classifier"
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    dense: bool = Field(False, description="also train what feeds only the head, such as a pooler")

    def selection(self, candidates: Candidates) -> Selection:
        wanted = ("head", "head.dense") if self.dense else ("head",)
        found = {n for n, roles in candidates.roles.items() if not set(wanted).isdisjoint(roles)}
        chosen = (found & set(candidates.targeted)) | set(candidates.fresh)
        if not chosen:
            raise PassError(
                "classifier: the model has no head among the parameters that it targets; load it with one "
                "(--task text-classification, …) or put one on with --pass head"
            )
        return Selection(candidates.only(chosen))
