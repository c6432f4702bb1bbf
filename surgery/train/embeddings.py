"""One vector for each row of a batch, and how well vectors find their partners."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.train.objective import Batch, output

Pooling = Literal["mean", "cls"]


def embedded(outputs: Any, name: str, pooling: Pooling, batch: Batch) -> Tensor:
    """Rows × features of an output of tokens, of feature maps (their mean), or of one vector for each row."""
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
    """Of each row of a to each row of b."""
    if kind == "cos":
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return a @ b.T


def retrieval(anchors: Tensor, positives: Tensor, kind: Literal["cos", "dot"]) -> dict[str, float]:
    """How often an anchor's own positive is the nearest of all (accuracy), and the mean of one over its rank (mrr).

    Those as near as its own share the rank: vectors that are all alike have the accuracy of chance.
    """
    hits = ranks = 0.0
    for start in range(0, len(anchors), 1024):
        found = similarities(anchors[start : start + 1024], positives, kind)
        own = found.diagonal(start).unsqueeze(1)
        nearer, alike = (found > own).sum(1), (found == own).sum(1).clamp_min(1)
        hits += float(torch.where(nearer == 0, 1 / alike.double(), 0.0).sum())
        ranks += float((1 / (nearer + (alike + 1).double() / 2)).sum())
    return {"accuracy": hits / len(anchors), "mrr": ranks / len(anchors)}
