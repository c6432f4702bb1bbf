"""Values inside a program while it runs: what a module gives, and the scores of an attention.

In a program's graph they are read at the node where the module ends, in a live model by a hook on the module.
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
    """Of some modules of a program, and of some attentions, each named by a module that holds it and no other.

    Names are module paths, or their ends, or targets of one site. whose: what a message calls the program.
    Raises TrainingError for a name that is of none, or of several.
    """

    def __init__(
        self,
        program: Program,
        modules: Sequence[str] = (),
        attentions: Sequence[str] = (),
        whose: str = "model",
    ) -> None:
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
        """While this lasts, a run of the module leaves its values for `hidden` and `scores`."""
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
                    "the scores of an attention are read from the program's graph; train with --form graph"
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
        """What the modules gave in the last run, in their order."""
        return [self._seen[f"module {path}"] for path in self.modules]

    def scores(self) -> list[tuple[Tensor, Tensor | None]]:
        """Of the attentions in the last run, in their order: q kᵀ over the root of the width (batch × heads × queries ×
        keys), and where a query sees a key, or None where it sees all."""
        return [_scores(*self._seen[f"attention {path}"]) for path in self.attentions]

    def _keep(self, key: str, value: Any) -> None:
        self._seen[key] = value

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, outputs: Any) -> None:
            self._keep(f"module {path}", outputs if isinstance(outputs, Tensor) else outputs[0])

        return hook

    def _variant(self, module: ProgramModule) -> fx.GraphModule:
        """The module's graph of its mode, with what keeps values."""
        key = (id(module), module.training)
        if key not in self._variants:
            self._variants[key] = module.variant(module.training, self._tap)
        return self._variants[key]

    def _tap(self, graph: fx.Graph) -> None:
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
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # grouped keys
    found = (q @ k.transpose(-1, -2)).float() * (scale or 1 / math.sqrt(q.shape[-1]))
    if mask is None and causal:
        mask = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).tril()
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return found, mask


def _paths(node: fx.Node) -> list[str]:
    return [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]


def _path(program: Program, name: str, whose: str) -> str:
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
            f"the {whose}'s {name!r} is {len(found)} modules; name one: {', '.join(found[:4])}"
        )
    raise TrainingError(f"the {whose} has no module or site {name!r}{nearest(name, known)}")


def _end(graph: fx.Graph, path: str, whose: str) -> fx.Node:
    """The value that a module gives."""
    inside = {node for node in graph.nodes if path in _paths(node)}
    ends = [n for n in graph.nodes if n in inside and any(user not in inside for user in n.users)]
    values = [n for n in ends if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_floating_point()]
    if len(values) != 1:
        raise TrainingError(
            f"the {whose}'s {path!r} gives {len(values)} values where it ends; name a module that gives one"
        )
    return values[0]


def _core(graph: fx.Graph, path: str, whose: str) -> fx.Node:
    """The attention that a module holds."""
    found = [n for n in graph.nodes if path in _paths(n) and op_name(n.target) == SDPA]
    if len(found) != 1:
        raise TrainingError(
            f"the {whose}'s {path!r} holds {len(found)} ops {SDPA}; name a module that holds one (a model may have to "
            f"be loaded with attn_implementation=sdpa)"
        )
    return found[0]
