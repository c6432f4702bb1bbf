"""The base of a program: the captured model as it was, which nothing ever changes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from surgery.capture import Captured, LoadedModel, LoadOptions, trace
from surgery.common.plugins import Plugins
from surgery.graph.graphs import writes
from surgery.graph.sites import Site, SiteIndex, SiteKey
from surgery.graph.view import View


@dataclass
class Base:
    """A captured model.

    loaded: module and inputs. captured: its eval graph. ref, options: how to find it again ("" for a module
    given from Python). in_memory: False where the weights are fake. consumed: merged in place. released: names of
    weights that were given back to the system. shells: the parameters that programs made over the memory of a base
    weight, by its name and their id, while they live. hindrance: why a site cannot be rewritten although a pass
    accepts it (in a live module), or None.
    """

    loaded: LoadedModel
    captured: Captured
    plugins: Plugins
    ref: str = ""
    options: LoadOptions = field(default_factory=LoadOptions)
    consumed: bool = False
    released: set[str] = field(default_factory=set)
    shells: WeakValueDictionary[tuple[str, int], nn.Parameter] = field(default_factory=WeakValueDictionary)
    hindrance: Callable[[Site], str | None] | None = None
    _train: Captured | None = None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer, by every name it has."""
        found: dict[str, Tensor] = dict(self.loaded.module.named_parameters(remove_duplicate=False))
        gm = self.captured.graph_module
        found.update(self.loaded.module.named_buffers(remove_duplicate=False))
        for name, tensor in [
            *gm.named_parameters(remove_duplicate=False),
            *gm.named_buffers(remove_duplicate=False),
        ]:
            found.setdefault(name, tensor)
        for node in gm.graph.nodes:  # lifted constants that are plain attributes
            if node.op == "get_attr" and node.target not in found:
                value = attrgetter(node.target)(gm)
                if isinstance(value, Tensor):
                    found[node.target] = value
        return found

    @cached_property
    def non_persistent(self) -> frozenset[str]:
        """Buffers that a state dict leaves out, and lifted constants."""
        kept = set(self.loaded.module.state_dict(keep_vars=True))
        return frozenset(name for name in self.tensors if name not in kept)

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Parameter name -> all names of that tensor, itself included."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            if isinstance(tensor, nn.Parameter):
                groups[id(tensor)].append(name)
        return {name: tuple(group) for group in groups.values() for name in group}

    @cached_property
    def fresh(self) -> tuple[str, ...]:
        """Parameters that the checkpoint did not hold, such as a new head; none where there is no checkpoint."""
        made = self.loaded.unsourced if self.loaded.files else frozenset()
        return tuple(n for n, group in self.names.items() if n == group[0] and not made.isdisjoint(group))

    @cached_property
    def view(self) -> View:
        """The analysis of the captured graph."""
        return View(self.captured.graph, self.names, self.plugins.weight_ops)

    @property
    def sites(self) -> SiteIndex:
        """Sites of the base graph, with roles."""
        return self.view.sites

    @property
    def roles(self) -> dict[SiteKey, str]:
        return {site.key: site.role for site in self.sites}

    @property
    def parts(self) -> dict[SiteKey, Mapping[str, tuple[int, ...]]]:
        return {site.key: site.parts for site in self.sites}

    @property
    def in_memory(self) -> bool:
        return not any(
            t.is_meta or isinstance(t, torch._subclasses.FakeTensor) for t in self.tensors.values()
        )

    def train_capture(self) -> Captured:
        """The graph in train mode, made once. Raises CaptureError where it cannot be made."""
        if self._train is None:
            self._train = trace(self.loaded, training=True)
        return self._train

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """sha256 of every file that gave the weights and the configuration, by file name."""
        return {path.name: sha256(path) for path in self.loaded.files}

    @cached_property
    def graph_hash(self) -> str:
        """A hash of the graph that does not depend on node names, symbols or weights."""
        return hash_graph(self.captured.graph)

    def site_table(self) -> list[list[Any]]:
        """What a saved directory keeps, to say which sites differ when the hash does."""
        return [[s.key.owner, s.kind, list(s.shape), str(s.dtype), len(s.calls)] for s in self.sites]


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_graph(graph: fx.Graph) -> str:
    """sha256 over ops, arguments and wiring.

    Nodes are hashed by what they are computed from, not by their place: some models iterate over sets, and are
    traced in another order by every process. Only ops with effects are hashed in order.
    """
    known: dict[fx.Node, str] = {}
    effects = ""
    for node in graph.nodes:
        if node.op == "get_attr" and not node.users:
            continue
        wired = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
        line = f"{node.op}|{_target(node)}|{wired}"
        acts = writes(node)
        if acts:
            line += effects
        known[node] = hashlib.sha256(line.encode()).hexdigest()
        if acts:
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
