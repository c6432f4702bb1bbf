"""All that a plugin may import.

The promise: a name in `__all__` keeps its meaning and its signature within a minor version of torch-surgery;
a change is announced in the changelog one minor version ahead, and the old form works, with a
DeprecationWarning, until then. Modules other than this one (and `surgery.testing`, for a plugin's tests) may
change at any time. A plugin is a distribution with an entry point in the group `surgery` that names a module
or an object with functions marked `@hookimpl`; the hooks are listed in `surgery.common.hooks`.

Passes      RewritePass, GraphPass, SelectPass, Pass, Field, TensorSpec, Selection, Candidates
            EXACT, rounded, changes, Numerics; of combining several: Combination, Place, Source
            Quantize, for passes that do more to a weight that it quantizes; CodesPass, whose codes take adapters in
At a site   Site, Rewriter, LINEAR CONV EMBEDDING EXPERTS NORM, WeightOp, Call, Probe
Programs'   View: sites, attentions, residual branches, blocks, depth
Algebra     low-rank: factor_shapes, branch, add_branch, add_rows, gather_index, AddLowRank
            scaling: channels, scale_output, scale_input, weighted_factor, ones_elsewhere, part_index, ScaleAxis
Patterns    PatternPass; written with pattern, ops, value, constant, number, axis, any_of, maybe, stored, shape_of,
            dtype_of; looked for with find in an OpIndex: Pattern, Match, NearMiss, Found
Models      LoadedModel, LoadOptions, from_module
Objectives  Objective, OnPolicy, TokenObjective, Setting; reference_of, FrozenPart, find_tokenizer, imported
            tensors of its own: Learned, among its companions under LEARNED
            dialogues: chat_template, chat_tokens, messages_in; the loop: train, Settings, read_rows, split, joined
Programs    Program, load, capture, Entry, Journal, PassReport, make_plugin_manager, Plugins
Errors      SurgeryError and its kinds, nearest
"""

from __future__ import annotations

from pydantic import Field

from surgery.capture import LoadedModel, LoadOptions, from_module
from surgery.capture.py import imported
from surgery.common.errors import (
    CaptureError,
    ExportError,
    JournalError,
    LoadError,
    MissingExtraError,
    PassError,
    PluginError,
    SurgeryError,
    TargetError,
    TrainingError,
    nearest,
)
from surgery.common.hooks import hookimpl
from surgery.common.plugins import Plugins, make_plugin_manager
from surgery.engine.change.plans import PassReport
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.base import GraphPass, Pass, Place, RewritePass, Source
from surgery.engine.contract.combination import Combination
from surgery.engine.contract.folds import MergeOp
from surgery.engine.contract.numerics import EXACT, Numerics, changes, rounded
from surgery.engine.contract.pattern import PatternPass, stored
from surgery.engine.contract.selection import Selection
from surgery.engine.contract.specs import TensorSpec
from surgery.engine.journal import Entry, Journal
from surgery.engine.probe import Probe
from surgery.engine.program import Program
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, NORM, Call, WeightOp
from surgery.graph.patterns import (
    Found,
    Match,
    NearMiss,
    OpIndex,
    Pattern,
    any_of,
    axis,
    constant,
    dtype_of,
    find,
    maybe,
    number,
    ops,
    pattern,
    shape_of,
    value,
)
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View
from surgery.passes.algebra.low_rank import (
    AddLowRank,
    add_branch,
    add_rows,
    branch,
    factor_shapes,
    gather_index,
)
from surgery.passes.algebra.scale import (
    ScaleAxis,
    channels,
    ones_elsewhere,
    part_index,
    scale_input,
    scale_output,
)
from surgery.passes.quantize.codes_pass import CodesPass
from surgery.passes.quantize.quantize import Quantize
from surgery.store.load import capture, load
from surgery.train.data import read_rows, split
from surgery.train.data_context import Setting
from surgery.train.dialogues import chat_template, chat_tokens, messages_in
from surgery.train.frozen_part import FrozenPart
from surgery.train.learned import LEARNED, Learned
from surgery.train.loop import train
from surgery.train.objective import Objective, OnPolicy
from surgery.train.options import Settings
from surgery.train.reference_policy import reference_of
from surgery.train.tables import joined
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tokens import TokenObjective

__all__ = [
    "CONV",
    "EMBEDDING",
    "EXACT",
    "EXPERTS",
    "LEARNED",
    "LINEAR",
    "NORM",
    "AddLowRank",
    "Call",
    "Candidates",
    "CaptureError",
    "CodesPass",
    "Combination",
    "Entry",
    "ExportError",
    "Field",
    "Found",
    "FrozenPart",
    "GraphPass",
    "Journal",
    "JournalError",
    "Learned",
    "LoadError",
    "LoadOptions",
    "LoadedModel",
    "Match",
    "MergeOp",
    "MissingExtraError",
    "NearMiss",
    "Numerics",
    "Objective",
    "OnPolicy",
    "OpIndex",
    "Pass",
    "PassError",
    "PassReport",
    "Pattern",
    "PatternPass",
    "Place",
    "PluginError",
    "Plugins",
    "Probe",
    "Program",
    "Quantize",
    "RewritePass",
    "Rewriter",
    "ScaleAxis",
    "SelectPass",
    "Selection",
    "Setting",
    "Settings",
    "Site",
    "Source",
    "SurgeryError",
    "TargetError",
    "TensorSpec",
    "TokenObjective",
    "TrainingError",
    "View",
    "WeightOp",
    "add_branch",
    "add_rows",
    "any_of",
    "axis",
    "branch",
    "capture",
    "changes",
    "channels",
    "chat_template",
    "chat_tokens",
    "constant",
    "dtype_of",
    "factor_shapes",
    "find",
    "find_tokenizer",
    "from_module",
    "gather_index",
    "hookimpl",
    "imported",
    "joined",
    "load",
    "make_plugin_manager",
    "maybe",
    "messages_in",
    "nearest",
    "number",
    "ones_elsewhere",
    "ops",
    "part_index",
    "pattern",
    "read_rows",
    "reference_of",
    "rounded",
    "scale_input",
    "scale_output",
    "shape_of",
    "split",
    "stored",
    "train",
    "value",
]
