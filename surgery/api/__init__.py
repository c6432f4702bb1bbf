"""Public names for authors of passes. A plugin imports `surgery.api` and no other module of surgery.

A name here, and in the modules below, keeps its meaning and signature within a minor version of torch-surgery. A change
is announced in the changelog one minor version ahead, and until then the old form works with a DeprecationWarning.
Other modules can change at any time, except `surgery.testing`, which a plugin's tests may use.

    surgery.api.patterns       passes that match several ops and replace them
    surgery.api.structure      blocks, branches and attentions, and functions to read a graph
    surgery.api.algebra        low-rank branches, scaling vectors, combining of several adapters
    surgery.api.quantization   passes that store quantized codes
    surgery.api.training       objectives, data, the training loop
    surgery.api.programs       programs, journals, loaders, the plugin manager, all errors

A plugin is a distribution with an entry point in the group `surgery`. The entry point names a module, or an object,
whose functions are marked `@hookimpl`; `surgery.common.hooks` lists the hooks.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from pydantic import Field

from surgery.common.errors import PassError, SurgeryError, nearest
from surgery.common.hooks import hookimpl
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.base import GraphPass, RewritePass
from surgery.engine.contract.effect import ADAPTER, STRUCTURE, SWAP, WEIGHT, Effect
from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.folds import Fold, Stage
from surgery.engine.contract.gradual import Gradual
from surgery.engine.contract.numerics import EXACT, Numerics, changes, rounded
from surgery.engine.contract.op import OpPass
from surgery.engine.contract.selection import Selection
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.engine.probe import Probe
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, NORM, Call, WeightOp
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes.algebra.low_rank import AddLowRank, add_branch, branch, factor_shapes
from surgery.passes.algebra.scale import ScaleAxis, scale_input, scale_output

__all__ = [
    "ADAPTER",
    "CONV",
    "EMBEDDING",
    "EXACT",
    "EXPERTS",
    "LINEAR",
    "NORM",
    "STRUCTURE",
    "SWAP",
    "WEIGHT",
    "AddLowRank",
    "Call",
    "Candidates",
    "Effect",
    "Expectations",
    "Field",
    "Fold",
    "Gradual",
    "GraphPass",
    "Numerics",
    "OpPass",
    "Outcome",
    "PassError",
    "Probe",
    "RewritePass",
    "Rewriter",
    "ScaleAxis",
    "SelectPass",
    "Selection",
    "Site",
    "Stage",
    "SurgeryError",
    "TensorSpec",
    "View",
    "WeightOp",
    "add_branch",
    "branch",
    "changes",
    "factor_shapes",
    "hookimpl",
    "nearest",
    "rounded",
    "scale_input",
    "scale_output",
]

# Module of surgery.api -> names that were in surgery.api itself in version 0.1.
_MOVED = {
    "patterns": (
        "PatternPass", "pattern", "ops", "value", "constant", "number", "axis", "any_of", "maybe", "stored",
        "shape_of", "dtype_of", "find", "OpIndex", "Pattern", "Match", "NearMiss", "Found",
    ),
    "algebra": (
        "Combination", "Place", "Source", "add_rows", "channels", "gather_index", "ones_elsewhere", "part_index",
    ),
    "quantization": ("CodesPass", "Quantize"),
    "training": (
        "LEARNED", "FrozenPart", "Learned", "Objective", "OnPolicy", "Setting", "Settings", "TokenObjective",
        "chat_template", "chat_tokens", "find_tokenizer", "joined", "messages_in", "read_rows", "reference_of",
        "split", "train",
    ),
    "programs": (
        "CaptureError", "Entry", "ExportError", "Journal", "JournalError", "LoadError", "LoadOptions", "LoadedModel",
        "MissingExtraError", "Pass", "PassReport", "PluginError", "Plugins", "Program", "TargetError",
        "TrainingError", "capture", "from_module", "imported", "load", "make_plugin_manager",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names of version 0.1 that have moved or were renamed, with a DeprecationWarning."""
    if name == "MergeOp":
        warnings.warn("surgery.api.MergeOp is now surgery.api.Fold", DeprecationWarning, stacklevel=2)
        return Fold
    if name in _MOVED:
        return importlib.import_module(f"surgery.api.{name}")
    for module, names in _MOVED.items():
        if name in names:
            warnings.warn(
                f"surgery.api.{name} has moved; import it from surgery.api.{module}",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(importlib.import_module(f"surgery.api.{module}"), name)
    raise AttributeError(f"module 'surgery.api' has no attribute {name!r}")
