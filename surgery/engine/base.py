"""The base of a program: the captured model in its original state. No pass changes it."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from surgery.capture import Captured, LoadedModel, LoadOptions, trace
from surgery.capture.devices import HOME
from surgery.common.plugins import Plugins, make_plugin_manager
from surgery.engine.labels import labels_in
from surgery.graph.graphs import writes
from surgery.graph.sites import Site, SiteIndex, SiteKey
from surgery.graph.view import View


@dataclass
class Base:
    """A captured model.

    A pickled base has neither its graph nor its plugin manager: a graph contains functions that cannot be pickled. The
    module is captured again when the graph is read first.

    Attributes:
        loaded: The module and its example inputs.
        captured: Its eval graph.
        plugins: The plugin manager.
        ref: Reference to load the model again; "" for a module given from Python.
        options: Options to load it again.
        consumed: True once adapters have been merged into the base's own storage.
        released: Names of weights whose memory has been freed.
        shells: Parameters that programs created over the memory of a base weight, by (name of the weight, id of the
            parameter), as long as they are alive.
        notes: Sentences for the user about the capture and the weights.
        hindrance: Function that returns the reason why a site cannot be rewritten although the pass accepts it, or
            None; set for live modules.
        heads: Names of the weights of output layers, for a model whose layers are captured one by one: roles cannot be
            derived there. None: roles are derived from the graph.
    """

    loaded: LoadedModel
    captured: Captured
    plugins: Plugins
    ref: str = ""
    options: LoadOptions = field(default_factory=LoadOptions)
    consumed: bool = False
    released: set[str] = field(default_factory=set)
    shells: WeakValueDictionary[tuple[str, int], nn.Parameter] = field(default_factory=WeakValueDictionary)
    notes: tuple[str, ...] = ()
    hindrance: Callable[[Site], str | None] | None = None
    heads: frozenset[str] | None = None
    _train: Captured | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "captured":
            self.captured = trace(self.loaded, check=False)
            return self.captured
        if name == "plugins":
            self.plugins = make_plugin_manager()
            return self.plugins
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        kept = ("loaded", "ref", "options", "consumed", "released", "notes", "heads")
        return {
            **{name: self.__dict__[name] for name in kept},
            "shells": {}, "hindrance": None, "_train": None,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.shells = WeakValueDictionary()

    def again(self, loaded: LoadedModel) -> None:
        """Use a model of another dtype, device or size from here on; it is captured when its graph is read.

        Args:
            loaded: The model, with names as before.
        """
        for name in ("captured", "tensors", "non_persistent", "names", "view", "graph_hash"):
            self.__dict__.pop(name, None)
        self.loaded, self._train = loaded, None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name; a tied tensor is listed under each of its names."""
        found: dict[str, Tensor] = dict(self.loaded.module.named_parameters(remove_duplicate=False))
        gm = self.captured.graph_module
        found.update(self.loaded.module.named_buffers(remove_duplicate=False))
        for name, tensor in [
            *gm.named_parameters(remove_duplicate=False),
            *gm.named_buffers(remove_duplicate=False),
        ]:
            found.setdefault(name, tensor)
        # Lifted constants are plain attributes, which named_buffers does not list.
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target not in found:
                value = attrgetter(node.target)(gm)
                if isinstance(value, Tensor):
                    found[node.target] = value
        return found

    @cached_property
    def non_persistent(self) -> frozenset[str]:
        """Names of non-persistent buffers and lifted constants, which a state dict does not contain."""
        kept = set(self.loaded.module.state_dict(keep_vars=True))
        return frozenset(name for name in self.tensors if name not in kept)

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Parameter name -> all names of that tensor, including this one."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            if isinstance(tensor, nn.Parameter):
                groups[id(tensor)].append(name)
        return {name: tuple(group) for group in groups.values() for name in group}

    @cached_property
    def fresh(self) -> tuple[str, ...]:
        """Parameters missing from the checkpoint, such as a new head; empty if the model has no checkpoint."""
        made = self.loaded.unsourced if self.loaded.files else frozenset()
        return tuple(n for n, group in self.names.items() if n == group[0] and not made.isdisjoint(group))

    @cached_property
    def view(self) -> View:
        """The analysis of the captured graph."""
        graph, ops = self.captured.graph, self.plugins.weight_ops
        if self.heads is None:
            return View(graph, self.names, ops)
        roles = {s.key: "head" for s in SiteIndex(graph, self.names, ops) if s.key.owner in self.heads}
        return View(graph, self.names, ops, known=(roles, {}, ()))

    @property
    def sites(self) -> SiteIndex:
        """Sites of the base graph, with roles."""
        return self.view.sites

    @property
    def roles(self) -> dict[SiteKey, str]:
        """Role of each site of the base graph."""
        return {site.key: site.role for site in self.sites}

    @property
    def parts(self) -> dict[SiteKey, Mapping[str, tuple[int, ...]]]:
        """Output features of each part of the fused projections, by site; empty for other sites."""
        return {site.key: site.parts for site in self.sites}

    @property
    def cross(self) -> frozenset[SiteKey]:
        """Sites of the projections of cross-attentions."""
        return frozenset(site.key for site in self.sites if site.cross)

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Class names by output, as the model's configuration has them."""
        return labels_in(self.loaded.config)

    @property
    def device(self) -> torch.device:
        """Device of the weights; of a model without any, the CPU."""
        return next((tensor.device for tensor in self.tensors.values()), HOME)

    @property
    def in_memory(self) -> bool:
        """False if the weights are meta or fake tensors."""
        return not any(
            t.is_meta or isinstance(t, torch._subclasses.FakeTensor) for t in self.tensors.values()
        )

    def train_capture(self) -> Captured:
        """The graph captured in train mode; captured once.

        Raises:
            CaptureError: The model cannot be captured in train mode.
        """
        if self._train is None:
            self._train = trace(self.loaded, training=True)
        return self._train

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """sha256 of every file that the weights and the configuration were read from, by name; see hash_files."""
        return hash_files(self.loaded.files)

    @cached_property
    def graph_hash(self) -> str:
        """Hash of the captured graph, independent of node names, symbols and weights."""
        return hash_graph(self.captured.graph)

    def site_table(self) -> list[list[Any]]:
        """Summary of all sites for saved directories: it identifies the sites that differ if the hash differs."""
        return [[s.key.owner, s.kind, list(s.shape), str(s.dtype), len(s.calls)] for s in self.sites]


def hash_files(files: Sequence[Path]) -> dict[str, str]:
    """sha256 of files, by their path from the innermost folder that holds them all: usually by their name."""
    if not files:
        return {}
    root = Path(os.path.commonpath([file.parent for file in files]))
    return {file.relative_to(root).as_posix(): sha256(file) for file in files}


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_graph(graph: fx.Graph) -> str:
    """sha256 over ops, arguments and wiring.

    The hash of a node depends on its inputs, not on its position: models that iterate over sets are traced in a
    different order by every process. Only ops with side effects are hashed in order.
    """
    known: dict[fx.Node, str] = {}
    effects = ""
    for node in graph.nodes:
        if node.op == "get_attr" and not node.users:
            continue
        wired = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
        line = f"{node.op}|{_target(node)}|{wired}"
        has_effect = writes(node)
        if has_effect:
            line += effects
        known[node] = hashlib.sha256(line.encode()).hexdigest()
        if has_effect:
            effects = known[node]
    return hashlib.sha256("\n".join(sorted(known.values())).encode()).hexdigest()


def _target(node: fx.Node) -> str:
    if node.op == "placeholder":
        return node.name
    if node.op == "get_attr":
        root = node.graph.owning_module
        value = attrgetter(str(node.target))(root) if root is not None else None
        return (
            f"{node.target}|{hash_graph(value.graph)}"
            if isinstance(value, fx.GraphModule)
            else str(node.target)
        )
    if isinstance(node.target, torch._ops.OpOverload) or not callable(node.target):
        return str(node.target)
    return f"{node.target.__module__}.{node.target.__qualname__}"
