"""The metadata keys that an exported file carries.

On the model: JOURNAL. On tensors: PASS, NAME, SITE, SOURCE, TIED. On nodes: PASS, NAME, SITE, FX_NODE,
FX_OUTPUT, MODULE. On a graph node's `meta["custom"]`, which survives tracing and decomposition: CUSTOM (a
mapping with the keys pass, name and site) and FX_NODE.
"""

from __future__ import annotations

JOURNAL = "surgery.journal"
PASS = "surgery.pass"
NAME = "surgery.name"
SITE = "surgery.site"
SOURCE = "surgery.source"  # the weight that this tensor is a transposed copy of
TIED = "surgery.tied"  # JSON list: the other names of a tensor that is stored once
FX_NODE = "surgery.node"  # the node of the program's graph that this ONNX node is part of
FX_OUTPUT = "surgery.output"  # present where this ONNX node's output is that node's value
MODULE = "surgery.module"  # path of the module that the node was traced in
CUSTOM = "surgery"  # in meta["custom"] only
