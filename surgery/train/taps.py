"""Captures values inside a program while it runs: outputs of modules and attention scores.

In a graph a value is read at the node where the module ends. In a live model a forward hook reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from surgery.common.errors import TargetError, TrainingError, nearest
from surgery.engine.module import ProgramModule
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.ops import arguments
from surgery.graph.targets import select_sites

if TYPE_CHECKING:
    from surgery.engine.program import Program

SDPA = "scaled_dot_product_attention"


class Taps:
    """Taps on modules and attentions of a program.

    Attributes:
        modules: paths of the tapped modules.
        attentions: paths of the tapped attentions.
        ends: example output of each tapped module.
        heads: number of heads of each tapped attention.
    """

    def __init__(
        self,
        program: Program,
        modules: Sequence[str] = (),
        attentions: Sequence[str] = (),
        whose: str = "model",
    ) -> None:
        """Find the modules.

        A name is a module path, the end of one, or a target of one site.

        Args:
            program: program to tap.
            modules: names of modules with one output.
            attentions: names of modules that contain one attention.
            whose: name of the program in errors, such as "teacher".

        Raises:
            TrainingError: a name matches no module, or several.
        """
        self.whose = whose
        self.modules = [_path(program, name, whose) for name in modules]
        self.attentions = [_path(program, name, whose) for name in attentions]
        self.ends = {path: _end(program.graph, path, whose).meta["val"] for path in self.modules}
        self.heads = {
            path: int(arguments(_core(program.graph, path, whose))["query"].meta["val"].shape[1])
            for path in self.attentions
        }
        self._variants: dict[tuple[int, bool], fx.GraphModule] = {}
        self._seen: dict[str, Any] = {}

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Capture values for `hidden` and `scores` while the context is active."""
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        self._seen = {}
        if not self.modules and not self.attentions:
            yield
        elif isinstance(inner, ProgramModule):
            compiled, training = inner.__dict__["_compiled"], inner.training
            plain = inner.graph_module(training)
            compiled[training] = self._variant(inner)
            try:
                yield
            finally:
                compiled[training] = plain
        else:
            if self.attentions:
                raise TrainingError(
                    "attention scores can be read only in the program's graph; train with --form graph"
                )
            hooks = [
                inner.get_submodule(path).register_forward_hook(self._hook(path)) for path in self.modules
            ]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def hidden(self) -> list[Tensor]:
        """Return the outputs of the tapped modules in the last run, in the order of `modules`."""
        return [self._seen[f"module {path}"] for path in self.modules]

    def scores(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return the attention scores of the last run, in the order of `attentions`.

        Returns:
            Pairs of q kᵀ / √width (batch × heads × queries × keys) and a mask that is True where a query sees a key,
            or None if every query sees every key.
        """
        return [_scores(*self._seen[f"attention {path}"]) for path in self.attentions]

    def _keep(self, key: str, value: Any) -> None:
        self._seen[key] = value

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, outputs: Any) -> None:
            self._keep(f"module {path}", outputs if isinstance(outputs, Tensor) else outputs[0])

        return hook

    def _variant(self, module: ProgramModule) -> fx.GraphModule:
        """Return the module's graph with taps, for its current mode."""
        key = (id(module), module.training)
        if key not in self._variants:
            self._variants[key] = module.variant(module.training, self._tap)
        return self._variants[key]

    def _tap(self, graph: fx.Graph) -> None:
        """Add an op that stores the value behind each tapped node."""
        for path in self.modules:
            node = _end(graph, path, self.whose)
            with graph.inserting_after(node):
                graph.call_function(self._keep, (f"module {path}", node))
        for path in self.attentions:
            node = _core(graph, path, self.whose)
            names = ("query", "key", "attn_mask", "is_causal", "scale")
            given = arguments(node)
            with graph.inserting_before(node):
                graph.call_function(
                    self._keep, (f"attention {path}", tuple(given.get(name) for name in names))
                )


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool | None, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Compute scores and mask from the arguments of scaled_dot_product_attention."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # grouped-query attention
    found = (q @ k.transpose(-1, -2)).float() * (scale or 1 / math.sqrt(q.shape[-1]))
    if mask is None and causal:
        mask = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).tril()
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return found, mask


def _paths(node: fx.Node) -> list[str]:
    return [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]


def _path(program: Program, name: str, whose: str) -> str:
    """Return the only module path that a name matches."""
    known = list(dict.fromkeys(path for node in program.graph.nodes for path in _paths(node) if path))
    found = [path for path in known if path == name] or [path for path in known if path.endswith(f".{name}")]
    if not found:
        try:
            sites = select_sites(program.sites.sites, name)
        except TargetError:
            sites = []
        found = list(dict.fromkeys(site.calls[0].module_path for site in sites))
    if len(found) == 1:
        return found[0]
    if found:
        raise TrainingError(
            f"the {whose}'s {name!r} matches {len(found)} modules; name one: {', '.join(found[:4])}"
        )
    raise TrainingError(f"the {whose} has no module or site {name!r}{nearest(name, known)}")


def _end(graph: fx.Graph, path: str, whose: str) -> fx.Node:
    """Return the node of a module's output: the only one that is read outside of the module."""
    inside = {node for node in graph.nodes if path in _paths(node)}
    ends = [n for n in graph.nodes if n in inside and any(user not in inside for user in n.users)]
    values = [n for n in ends if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_floating_point()]
    if len(values) != 1:
        raise TrainingError(
            f"the {whose}'s {path!r} has {len(values)} outputs; name a module with one output"
        )
    return values[0]


def _core(graph: fx.Graph, path: str, whose: str) -> fx.Node:
    """Return the attention op of a module."""
    found = [n for n in graph.nodes if path in _paths(n) and op_name(n.target) == SDPA]
    if len(found) != 1:
        raise TrainingError(
            f"the {whose}'s {path!r} contains {len(found)} {SDPA} ops; name a module that contains one (you may "
            f"have to load the model with attn_implementation=sdpa)"
        )
    return found[0]
