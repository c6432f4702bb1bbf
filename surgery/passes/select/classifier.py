"""classifier: trains only the head, as a linear probe on frozen features."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from surgery.common.errors import PassError
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection


class Classifier(SelectPass):
    """Linear probing: only the head trains, y = V f(x) + c with f frozen (Alain & Bengio 2016, arXiv:1610.01644).

    The head is the layer that computes an output of the model (role `head`), found by dataflow. With `--dense`, layers
    that feed only the head train too (role `head.dense`: BERT's pooler, RoBERTa's dense layer). Parameters that the
    checkpoint did not contain also train, wherever they are, because a random layer below the head would otherwise stay
    random. If the head of a language model is tied to the token embeddings, these train with it, since they are one
    tensor. Applying the pass does not change the outputs.
    """

    name: ClassVar[str] = "classifier"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass classifier -o head/"
    )
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    dense: bool = Field(
        default=False, description="also train layers that feed only the head, such as a pooler"
    )

    def selection(self, candidates: Candidates) -> Selection:
        wanted = ("head", "head.dense") if self.dense else ("head",)
        found = {n for n, roles in candidates.roles.items() if not set(wanted).isdisjoint(roles)}
        chosen = (found & set(candidates.targeted)) | set(candidates.fresh)
        if not chosen:
            raise PassError(
                "classifier: the model has no head among the targeted parameters; load it with one (--task "
                "text-classification, …) or add one with --pass head"
            )
        return Selection(candidates.only(chosen))
