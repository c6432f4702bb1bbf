"""Cross-entropy over tokens, the shared base of language-model objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.train.data_context import Row, Setting, padded
from surgery.train.objective import Batch, Objective, output, run

IGNORED = -100  # label of positions without a loss, the default of torch's cross_entropy


class TokenObjective(Objective):
    """Base of objectives with token labels.

    A batch has `labels`: the token to predict at each position of the output, or IGNORED.
    """

    def examples_of(self, ids: Sequence[int], labels: Sequence[int]) -> Row:
        """Make an example of tokens and labels."""
        return {"input_ids": list(ids), "labels": list(labels)}

    def labelled(self, examples: Sequence[Row], setting: Setting) -> Batch:
        """Make a batch with `labels`, padded like the inputs."""
        inputs = setting.pad(examples)
        length = inputs["input_ids"].shape[1]
        return {"inputs": inputs, "labels": padded([e["labels"] for e in examples], IGNORED, length)}

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return self._summed(module, batch) / self.terms(batch)

    def _summed(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the cross-entropy over all labels."""
        logits, labels = output(run(module, batch), "logits"), batch["labels"]
        # A half-precision sum of many small terms would lose most of them.
        return F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def terms(self, batch: Batch) -> int:
        return max(1, int((batch["labels"] != IGNORED).sum()))

    def observe(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        summed = self._summed(module, batch).double().reshape(1)
        return {"summed": summed, "terms": torch.tensor([self.terms(batch)], device=summed.device)}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        mean = float(observed["summed"].sum() / observed["terms"].sum())
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}


def next_tokens(labels: Sequence[int]) -> list[int]:
    """Shift labels left by one, so that each position predicts the next token."""
    return [*labels[1:], IGNORED]
