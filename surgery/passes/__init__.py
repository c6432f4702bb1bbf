"""Built-in passes, registered through the same hook as everybody's."""

from __future__ import annotations

from surgery.hookspecs import hookimpl
from surgery.passes.adapter import Adapter
from surgery.passes.bitfit import Bitfit
from surgery.passes.classifier import Classifier
from surgery.passes.embedding import Embedding
from surgery.passes.expand import Expand
from surgery.passes.filter import Filter
from surgery.passes.freeze import Freeze
from surgery.passes.full import Full
from surgery.passes.gradual_unfreeze import GradualUnfreeze
from surgery.passes.head import Head
from surgery.passes.layerwise import Layerwise
from surgery.passes.lora import Lora
from surgery.passes.low_rank import LowRank
from surgery.passes.prefix import Prefix
from surgery.passes.prompt import Prompt
from surgery.passes.prune_filters import PruneFilters
from surgery.passes.quantize import Quantize
from surgery.passes.share import Share
from surgery.passes.sparse_tune import SparseTune
from surgery.passes.untie import Untie
from surgery.passes.vocab import Vocab


@hookimpl
def surgery_passes() -> list[type]:
    return [
        Lora,
        Quantize,
        PruneFilters,
        Adapter,
        Freeze,
        LowRank,
        Share,
        Untie,
        SparseTune,
        Head,
        Vocab,
        Prefix,
        Prompt,
        Bitfit,
        Classifier,
        Embedding,
        Expand,
        Filter,
        Full,
        GradualUnfreeze,
        Layerwise,
    ]


__all__ = [
    "Adapter",
    "Bitfit",
    "Classifier",
    "Embedding",
    "Expand",
    "Filter",
    "Freeze",
    "Full",
    "GradualUnfreeze",
    "Head",
    "Layerwise",
    "Lora",
    "LowRank",
    "Prefix",
    "Prompt",
    "PruneFilters",
    "Quantize",
    "Share",
    "SparseTune",
    "Untie",
    "Vocab",
    "surgery_passes",
]
