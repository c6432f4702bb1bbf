"""Pools outputs to one embedding per row, and measures how well embeddings find their partners."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.train.objective import Batch, output

Pooling = Literal["mean", "cls"]


def embedded(outputs: Any, name: str, pooling: Pooling, batch: Batch) -> Tensor:
    """Return one embedding per row (rows × features).

    The output may be token states, feature maps (averaged over space), or one vector per row.

    Args:
        outputs: outputs of the module.
        name: name of the output.
        pooling: how token states are pooled: "mean" over unmasked tokens, or "cls" (the first token).
        batch: batch with the attention mask.
    """
    states = output(outputs, name).float()
    if states.dim() == 2:
        return states
    if states.dim() == 4:
        return states.mean((2, 3))
    if pooling == "cls":
        return states[:, 0]
    seen = batch["inputs"].get("attention_mask")
    if seen is None:
        return states.mean(1)
    weights = seen.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def similarities(a: Tensor, b: Tensor, kind: Literal["cos", "dot"]) -> Tensor:
    """Return the similarity of each row of `a` to each row of `b`.

    Args:
        a: N × features.
        b: M × features.
        kind: cosine or dot product.

    Returns:
        N × M.
    """
    if kind == "cos":
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return a @ b.T


def retrieval(anchors: Tensor, positives: Tensor, kind: Literal["cos", "dot"]) -> dict[str, float]:
    """Measure how well each anchor finds its own positive among all positives.

    Ties share a rank, so identical vectors score like chance.

    Args:
        anchors: N × features.
        positives: N × features, in the order of the anchors.
        kind: cosine or dot product.

    Returns:
        accuracy: share of anchors whose own positive is nearest. mrr: mean reciprocal rank of the own positive.
    """
    hits = ranks = 0.0
    for start in range(0, len(anchors), 1024):
        found = similarities(anchors[start : start + 1024], positives, kind)
        own = found.diagonal(start).unsqueeze(1)
        nearer, alike = (found > own).sum(1), (found == own).sum(1).clamp_min(1)
        hits += float(torch.where(nearer == 0, 1 / alike.double(), 0.0).sum())
        ranks += float((1 / (nearer + (alike + 1).double() / 2)).sum())
    return {"accuracy": hits / len(anchors), "mrr": ranks / len(anchors)}
