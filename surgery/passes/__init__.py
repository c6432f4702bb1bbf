"""Built-in passes, registered through the same hook as those of plugins."""

from __future__ import annotations

from surgery.common.hooks import hookimpl
from surgery.common.plugins import check_classes
from surgery.engine.change.freeze import Freeze
from surgery.engine.contract.base import Pass
from surgery.passes.adapter import Adapter
from surgery.passes.bitfit import Bitfit
from surgery.passes.delta import Delta
from surgery.passes.expand.expand import Expand
from surgery.passes.fuse.fold_batchnorm import FoldBatchnorm
from surgery.passes.fuse.fuse_attention import FuseAttention
from surgery.passes.fuse.fuse_gelu import FuseGelu
from surgery.passes.fuse.fuse_qkv import FuseQkv
from surgery.passes.fuse.fuse_rmsnorm import FuseRmsnorm
from surgery.passes.fuse.split_qkv import SplitQkv
from surgery.passes.heads.head import Head
from surgery.passes.heads.vocab import Vocab
from surgery.passes.lora.lora import Lora
from surgery.passes.low_rank import LowRank
from surgery.passes.prefix.prefix import Prefix
from surgery.passes.prompt.prompt import Prompt
from surgery.passes.prune.prune_filters import PruneFilters
from surgery.passes.quantize.convert import Convert
from surgery.passes.quantize.fake_quant import FakeQuant
from surgery.passes.quantize.quantize import Quantize
from surgery.passes.select.classifier import Classifier
from surgery.passes.select.embedding import Embedding
from surgery.passes.select.filter import Filter
from surgery.passes.select.full import Full
from surgery.passes.select.gradual_unfreeze import GradualUnfreeze
from surgery.passes.select.layerwise import Layerwise
from surgery.passes.share import Share
from surgery.passes.sparse.sparse import Sparse
from surgery.passes.sparse.sparse_tune import SparseTune
from surgery.passes.untie import Untie


@hookimpl
def surgery_passes() -> list[type]:
    """Return the built-in pass classes."""
    return [
        Lora,
        Quantize,
        FakeQuant,
        Convert,
        Sparse,
        PruneFilters,
        Adapter,
        Delta,
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


def _check_passes(given: object) -> None:
    check_classes(given, "surgery_passes", Pass)


CHECKS_OF_HOOKS = {"surgery_passes": _check_passes}

__all__ = [
    "Adapter",
    "Bitfit",
    "Classifier",
    "Convert",
    "Delta",
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
