"""surgery: plugin-based model surgery for PyTorch.

>>> import surgery
>>> program = surgery.load("hf:path/to/model").apply(surgery.Lora(target="attn.*", rank=8))
>>> module = program.module()          # train it with any loop
>>> program.merge().export("model.onnx")

Names are imported on first use (PEP 562), so that `import surgery` and `surgery --help` start quickly.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for mypy and editors; tests/cli/test_startup.py compares these imports with _NAMES
    from surgery.common.errors import SurgeryError
    from surgery.engine.journal import Entry, Journal
    from surgery.engine.program import Program
    from surgery.live import (
        apply_,
        combine_,
        load_,
        merge_,
        mixed_batch,
        plan_,
        program_of,
        remove_,
        save_,
        using,
        weight_,
    )
    from surgery.passes import (
        Adapter,
        Bitfit,
        Classifier,
        Convert,
        Delta,
        Embedding,
        Expand,
        FakeQuant,
        Filter,
        FoldBatchnorm,
        Freeze,
        Full,
        FuseAttention,
        FuseGelu,
        FuseQkv,
        FuseRmsnorm,
        GradualUnfreeze,
        Head,
        Layerwise,
        Lora,
        LowRank,
        Prefix,
        Prompt,
        PruneFilters,
        Quantize,
        Share,
        Sparse,
        SparseTune,
        SplitQkv,
        Untie,
        Vocab,
    )
    from surgery.store.load import capture, load
    from surgery.store.lora_files import export_lora, import_lora
    from surgery.store.peft import export_peft, import_peft
    from surgery.train import penalties

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Bitfit",
    "Classifier",
    "Convert",
    "Delta",
    "Embedding",
    "Entry",
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
    "Journal",
    "Layerwise",
    "Lora",
    "LowRank",
    "Prefix",
    "Program",
    "Prompt",
    "PruneFilters",
    "Quantize",
    "Share",
    "Sparse",
    "SparseTune",
    "SplitQkv",
    "SurgeryError",
    "Untie",
    "Vocab",
    "__version__",
    "apply_",
    "capture",
    "combine_",
    "export_lora",
    "export_peft",
    "import_lora",
    "import_peft",
    "load",
    "load_",
    "merge_",
    "mixed_batch",
    "penalties",
    "plan_",
    "program_of",
    "remove_",
    "save_",
    "using",
    "weight_",
]

# Module -> the names of __all__ that it defines.
_NAMES = {
    "surgery.common.errors": ("SurgeryError",),
    "surgery.engine.journal": (
        "Entry",
        "Journal",
    ),
    "surgery.engine.program": ("Program",),
    "surgery.live": (
        "apply_",
        "combine_",
        "load_",
        "merge_",
        "mixed_batch",
        "plan_",
        "program_of",
        "remove_",
        "save_",
        "using",
        "weight_",
    ),
    "surgery.passes": (
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
    ),
    "surgery.store.load": (
        "capture",
        "load",
    ),
    "surgery.store.lora_files": (
        "export_lora",
        "import_lora",
    ),
    "surgery.store.peft": (
        "export_peft",
        "import_peft",
    ),
}

_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
# Public modules that are attributes of the package without an import of their own.
_SUBMODULES = ("api", "penalties", "testing")


def __getattr__(name: str) -> Any:
    """Import a public name or module on first use."""
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


class _Package(ModuleType):
    """The package itself. It keeps the function `surgery.capture` when the subpackage of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets every imported submodule as an attribute of its package.
        if name in _MODULE_OF and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
