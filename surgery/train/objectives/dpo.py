"""dpo: make the preferred one of two answers more likely, relative to a reference policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.train.objective import Batch, output, run
from surgery.train.pairs import PairObjective, pair_accuracy
from surgery.train.reference_policy import copy_of, reference_of
from surgery.train.tokens import IGNORED

if TYPE_CHECKING:
    from surgery.engine.program import Program


class Dpo(PairObjective):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

    The log-ratio of an answer is ρ(y) = log π(y|x) − log π_ref(y|x), summed over its tokens. With h = ρ(y_chosen) −
    ρ(y_rejected), the loss is

        sigmoid   L = −(1 − ε) log σ(β h) − ε log σ(−β h)
        ipo       L = (h' − 1 / 2β)², where h' uses means over the tokens (Azar et al. 2023, arXiv:2310.12036)

    ε is the expected share of wrong labels (cDPO; --smoothing). π_ref is the program without its trained parts, in
    the same storage: without adapters, or with the original base weights if `full` or another selection trains these.
    `--reference start` instead copies the program at the start of the training, for example an adapter that was
    already fine-tuned on answers.

    Rows are those of `reward`. The metrics are the loss, the share of pairs in which the preferred answer has the
    higher implicit reward β ρ (accuracy; a tie, as all pairs are at the start, counts one half), and the mean
    difference (margin).
    """

    name: ClassVar[str] = "dpo"
    example: ClassVar[str] = (
        'surgery apply hf:HuggingFaceTB/SmolLM2-135M-Instruct --pass lora --target "attn.*" -o '
        "adapted/\n"
        "surgery train adapted/ --objective dpo --data preferences.jsonl -o preferred/"
    )
    pace: ClassVar[float] = 0.1
    heads: ClassVar[tuple[str, ...]] = ("text-generation",)

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference policy")
    smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="sigmoid: expected share of wrong labels")
    kind_of_loss: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid", alias="loss", description="loss of a pair"
    )
    reference: Literal["base", "start"] = Field(
        default="base",
        description="reference policy: the program without its trained parts, or a copy of its start",
    )

    def companions(self, program: Program) -> Mapping[str, nn.Module]:
        kept = reference_of(program) if self.reference == "base" else copy_of(program)
        return {"reference": kept.graph_module}

    def complete(self, batch: Batch, companions: Mapping[str, nn.Module]) -> Batch:
        return {**batch, "reference": self.log_probs(companions["reference"], batch)}

    def log_probs(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return log π of each row's answer, summed over its tokens."""
        logits, labels = output(run(module, batch), "logits"), batch["labels"]
        rows, places = torch.nonzero(labels != IGNORED, as_tuple=True)
        # Log-probabilities of answer tokens only: those of all tokens and the vocabulary would be the largest tensor.
        found = -F.cross_entropy(logits[rows, places].float(), labels[rows, places], reduction="none")
        return torch.zeros(len(labels), device=found.device).index_add(0, rows, found)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return self._losses(self._ratios(module, batch), batch).mean()

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ratios = self._ratios(module, batch)
        chosen, rejected = ratios.chunk(2)
        return {"losses": self._losses(ratios, batch), "margin": self.beta * (chosen - rejected)}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        losses, margin = observed["losses"].double(), observed["margin"].double()
        return {
            "loss": float(losses.mean()),
            "accuracy": pair_accuracy(margin),
            "margin": float(margin.mean()),
        }

    def _ratios(self, module: nn.Module, batch: Batch) -> Tensor:
        return self.log_probs(module, batch) - batch["reference"]

    def _losses(self, ratios: Tensor, batch: Batch) -> Tensor:
        if self.kind_of_loss == "ipo":
            means = ratios / (batch["labels"] != IGNORED).sum(1)
            chosen, rejected = means.chunk(2)
            return (chosen - rejected - 1 / (2 * self.beta)).square()
        chosen, rejected = ratios.chunk(2)
        margin = self.beta * (chosen - rejected)
        return -(1 - self.smoothing) * F.logsigmoid(margin) - self.smoothing * F.logsigmoid(-margin)
