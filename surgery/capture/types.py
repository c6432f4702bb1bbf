"""What a loader hands over, and what a capture yields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class LoadOptions:
    """What the user said about how to load a reference.

    task: the head to load (`text-classification`, ...); None means what the configuration names.
    model_kwargs: passed to the loader's constructor (`num_labels`, `dtype`, `gguf_file`, ...).
    trust: whether a file that can run code when it is read may be read.
    example: overrides of the example's sizes by dimension or setting name (`{"batch": 4, "seq": 32}`).
    """

    task: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False
    example: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedModel:
    """A module with what is needed to trace it and to find it again.

    module: in eval mode, and owned by us (the caller of the loader never sees it again).
    args, kwargs: example inputs, batch of at least 2.
    dynamic_shapes: as `torch.export.export` takes it, keyed by input name (kwargs) or a tuple (args), with
        named `torch.export.Dim`s.
    files: the files whose bytes gave the weights and the configuration; hashed for the fingerprint.
    unsourced: names of parameters and persistent buffers that `files` did not provide (a new head, a random
        initialisation); they are stored with every saved program.
    metadata: JSON-able facts for the user and for exporters (task, model type, tokenizer directory).
    train_ready: called on the module before it is captured in train mode (to mend what cannot be traced).
    patches: gives the context in which the module is exported (library fixes that make it traceable).
    may_fix: dynamic dimensions that may stay at the example's size where the model's code fixes them (a scan
        that is unrolled over the sequence); the capture says so in its notes. Any other is an error then.
    config: of a transformers model, its configuration as it was before it was set up to be captured.
    cached: of one, the modules whose configuration had its cache on then: path, and number among nested ones.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    files: tuple[Path, ...] = ()
    unsourced: frozenset[str] = frozenset()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    train_ready: Callable[[nn.Module], None] | None = None
    patches: Callable[[], AbstractContextManager[Any]] = nullcontext
    may_fix: frozenset[str] = frozenset()
    config: Any = None
    cached: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Captured:
    """A traced graph over ATen ops; its parameters and buffers are the module's own objects.

    graph_module: flat (no submodule calls), get_attr targets are the module's own parameter names, and it
        takes and returns what the eager module does (a dict where that returns a ModelOutput).
    training: the mode that it was traced in.
    notes: what a user has to know about it, in sentences: a dimension that the model's code fixes.
    """

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    training: bool
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """All tensors in a nested structure, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
