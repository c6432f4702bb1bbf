"""Programs, journals, loaders, the op of linear recurrences, the plugin manager and all errors."""

from __future__ import annotations

from surgery.capture import LoadedModel, LoadOptions, from_module
from surgery.capture.py import imported
from surgery.capture.recurrences.operators import linear_attention
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
)
from surgery.common.plugins import Plugins, make_plugin_manager
from surgery.engine.change.plans import PassReport
from surgery.engine.contract.base import Pass
from surgery.engine.journal import Entry, Journal
from surgery.engine.program import Program
from surgery.engine.registry import find_pass, passes
from surgery.store.load import capture, load

__all__ = [
    "CaptureError",
    "Entry",
    "ExportError",
    "Journal",
    "JournalError",
    "LoadError",
    "LoadOptions",
    "LoadedModel",
    "MissingExtraError",
    "Pass",
    "PassError",
    "PassReport",
    "PluginError",
    "Plugins",
    "Program",
    "SurgeryError",
    "TargetError",
    "TrainingError",
    "capture",
    "find_pass",
    "from_module",
    "imported",
    "linear_attention",
    "load",
    "make_plugin_manager",
    "passes",
]
