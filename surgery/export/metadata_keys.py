"""Metadata keys of an exported ONNX file.

The model has JOURNAL, BASE, LABELS and PARITY, PIXELS if it reads images, RANGES if a dimension does not take every
size, and CPU if it needs a kind of processor.
Tensors have PASS, NAME, SITE, SOURCE and TIED. Nodes have PASS, NAME, SITE, FX_NODE, FX_OUTPUT and MODULE. CUSTOM (a
mapping with the keys pass, name and site) and FX_NODE are also keys of `meta["custom"]` of an fx node, because that
dict survives tracing and decomposition.
"""

from __future__ import annotations

JOURNAL = "surgery.journal"
LABELS = "surgery.labels"  # JSON object: output -> list of its class names
BASE = "surgery.base"  # JSON object: reference, repository, commit and task of the base, without local paths
# JSON object: output -> errors of the file as written and as onnxruntime optimizes it
PARITY = "surgery.parity"
# JSON object: "mean" and "std" of the pixels from 0 to 1, one number for each channel
PIXELS = "surgery.pixels"
# JSON object: dimension -> its sizes, "min" and "max", and "step" and "shift" if only shift + a multiple of step fits
RANGES = "surgery.ranges"
CPU = "surgery.cpu"  # "vnni": products saturate on x86 processors without VNNI
PASS = "surgery.pass"
NAME = "surgery.name"
SITE = "surgery.site"
SOURCE = "surgery.source"  # name of the weight that this tensor stores transposed
TIED = "surgery.tied"  # JSON list of the other names of this tensor
FX_NODE = "surgery.node"  # fx node of the program that this ONNX node is part of
FX_OUTPUT = "surgery.output"  # present if the first output is the value of that fx node
MODULE = "surgery.module"  # path of the module that the fx node was traced in
CUSTOM = "surgery"  # only in meta["custom"] of an fx node
