"""Loading and tracing: a loader turns a reference into a module with example inputs, `trace` captures it as a graph."""

from surgery.capture.fresh import fresh_inputs, other_sizes
from surgery.capture.module import from_module
from surgery.capture.shapes import dynamic_axes, named_sizes
from surgery.capture.trace import trace
from surgery.capture.types import Captured, LoadedModel, LoadOptions, tensor_leaves

__all__ = [
    "Captured",
    "LoadOptions",
    "LoadedModel",
    "dynamic_axes",
    "fresh_inputs",
    "from_module",
    "named_sizes",
    "other_sizes",
    "tensor_leaves",
    "trace",
]
