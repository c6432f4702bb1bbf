"""surgery: plugin-based model surgery for PyTorch.

>>> import surgery
>>> program = surgery.load("hf:path/to/model").apply(surgery.Lora(target="attn.*", rank=8))
>>> module = program.module()          # train it with any loop
>>> program.merge().export("model.onnx")
"""

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
from surgery.store.peft import export_peft, import_peft
from surgery.train import penalties

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Bitfit",
    "Classifier",
    "Convert",
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
    "export_peft",
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
