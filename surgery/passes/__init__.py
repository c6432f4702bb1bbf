"""Built-in passes, registered through the same hook as everybody's."""

from __future__ import annotations

from surgery.hookspecs import hookimpl
from surgery.passes.adapter import Adapter
from surgery.passes.bitfit import Bitfit
from surgery.passes.classifier import Classifier
from surgery.passes.convert import Convert
from surgery.passes.embedding import Embedding
from surgery.passes.expand import Expand
from surgery.passes.fake_quant import FakeQuant
from surgery.passes.filter import Filter
from surgery.passes.fold_batchnorm import FoldBatchnorm
from surgery.passes.freeze import Freeze
from surgery.passes.full import Full
from surgery.passes.fuse_attention import FuseAttention
from surgery.passes.fuse_gelu import FuseGelu
from surgery.passes.fuse_qkv import FuseQkv
from surgery.passes.fuse_rmsnorm import FuseRmsnorm
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
from surgery.passes.sparse import Sparse
from surgery.passes.sparse_tune import SparseTune
from surgery.passes.split_qkv import SplitQkv
from surgery.passes.untie import Untie
from surgery.passes.vocab import Vocab


@hookimpl
def surgery_passes() -> list[type]:
    return [
        Lora,
        Quantize,
        FakeQuant,
        Convert,
        Sparse,
        PruneFilters,
        Adapter,
        Freeze,
        LowRank,
        Share,
        Untie,
        SparseTune,
        SplitQkv,
        Head,
        Vocab,
        Prefix,
        Prompt,
        Bitfit,
        Classifier,
        Embedding,
        Expand,
        Filter,
        FoldBatchnorm,
        Full,
        FuseAttention,
        FuseGelu,
        FuseQkv,
        FuseRmsnorm,
        GradualUnfreeze,
        Layerwise,
    ]


__all__ = [
    "Adapter",
    "Bitfit",
    "Classifier",
    "Convert",
    "Embedding",
    "Expand",
    "FakeQuant",
    "Filter",
    "FoldBatchnorm",
    "Freeze",
    "Full",
    "FuseAttention",
    "FuseGelu",
    "FuseQkv",
    "FuseRmsnorm",
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
    "Sparse",
    "SparseTune",
    "SplitQkv",
    "Untie",
    "Vocab",
    "surgery_passes",
]
