"""Data types of capture: load options, a loaded model and a captured graph."""

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
    """User options for loading a reference.

    Attributes:
        task: head to load (`text-classification`, ...); None loads the class named in the configuration.
        model_kwargs: keyword arguments of the model's constructor (`num_labels`, `dtype`, `gguf_file`, ...).
        trust: True allows reading a file that can run code.
        example: sizes of the example inputs by dimension or setting name (`{"batch": 4, "seq": 32}`).
        random: True builds the model with random weights instead of fetching or reading those of its checkpoint.
        commit: commit hash on the hub to load, whatever the reference names; None loads the reference's own revision.
        input: example inputs as text, for a `py:` reference (surgery.capture.input_text).
    """

    task: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False
    example: Mapping[str, int] = field(default_factory=dict)
    random: bool = False
    commit: str | None = None
    input: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedModel:
    """A module with the inputs, shapes and files needed to trace it and to load it again.

    Attributes:
        module: the module, in eval mode. The LoadedModel owns it; the code that loaded it must not use it further.
        args: positional example inputs, with a batch of at least 2.
        kwargs: example inputs by name, with a batch of at least 2.
        dynamic_shapes: dynamic dimensions as `torch.export.export` takes them, with named `torch.export.Dim`s: a dict
            by input name, or a tuple with one entry for each input.
        files: files that the weights and the configuration were read from; their hash is the fingerprint.
        unsourced: names of parameters and persistent buffers that `files` do not contain (a new head, random
            weights). They are stored with every saved program.
        stored: names of tensors that `files` do contain, but with other values, such as the weights that a merge has
            changed. They are stored with every saved program too.
        metadata: JSON-compatible facts for the user and for exporters (task, model type, tokenizer directory).
        train_ready: function called on the module before a capture in train mode, to disable code that cannot be
            traced.
        patches: returns a context manager for the export (library patches that make the module traceable).
        may_fix: dynamic dimensions that may become static if the model's code fixes their size (for example a scan
            unrolled over the sequence). The capture notes it. For any other dimension it is an error.
        config: transformers models only: the configuration before the model was prepared for capture.
        cached: transformers models only: modules whose configuration had `use_cache` on before the capture, as
            module path and index among the nested configurations.
        whole: the model, if it cannot be captured and `module` only calls its layers one by one, for a live model.
        notes: sentences for the user about the inputs.
        repo: repository on the hub that `files` were fetched from; "" for local files.
        commit: its commit hash.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    files: tuple[Path, ...] = ()
    unsourced: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    train_ready: Callable[[nn.Module], None] | None = None
    patches: Callable[[], AbstractContextManager[Any]] = nullcontext
    may_fix: frozenset[str] = frozenset()
    config: Any = None
    cached: tuple[tuple[str, int], ...] = ()
    whole: nn.Module | None = None
    notes: tuple[str, ...] = ()
    repo: str = ""
    commit: str = ""

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.module if self.whole is None else self.whole


@dataclass(frozen=True)
class Captured:
    """A traced graph of ATen ops that shares the parameters and buffers of the eager module.

    Attributes:
        graph_module: flat graph module without submodule calls. Its get_attr targets are the module's parameter
            names. Its inputs and outputs are those of the eager module, with a dict instead of a ModelOutput.
        args: positional example inputs.
        kwargs: example inputs by name.
        dynamic_shapes: dynamic dimensions that the graph is valid for.
        training: True if the module was traced in train mode.
        notes: sentences for the user, for example about a dimension that had to be fixed.
    """

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    training: bool
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph of `graph_module`."""
        return self.graph_module.graph


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """All tensors in a nested structure, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
