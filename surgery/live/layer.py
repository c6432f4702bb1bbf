"""One layer, rewritten: its forward as a graph of its own, in which a journal's entries are replayed."""

from __future__ import annotations

import inspect
import json
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.graph import CodeGen

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.engine.journal import Entry, SiteRecord
from surgery.engine.recompute import REMADE, recomputed
from surgery.engine.replay import rewrite_entry
from surgery.graph.compiled import check_targets
from surgery.graph.fake import MetaCache
from surgery.graph.graphs import copy_graph, without_replaced
from surgery.graph.ops import WeightOp
from surgery.graph.view import View

_serial = count()
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Piece:
    """What one entry does at one layer. owner: the first name of the weight that the record's site is keyed on."""

    entry: Entry
    pass_: RewritePass
    record: SiteRecord
    owner: str


class LayerError(Exception):
    """Why a layer cannot be rewritten by itself; the message is a clause."""


class Layers:
    """Graphs and classes of layers, made once for all layers that are alike.

    ops: what counts as a weight op.
    """

    def __init__(self, ops: Mapping[Any, WeightOp]) -> None:
        self.ops = ops
        self._bare: dict[Any, fx.Graph] = {}
        self._uses: dict[Any, frozenset[tuple[str, str]]] = {}
        self._classes: dict[Any, type[nn.Module]] = {}

    def bare(self, layer: nn.Module, rank: int, shape: Sequence[int] | None, dtype: torch.dtype) -> fx.Graph:
        """The layer's own forward over ATen ops, at an input of this rank; get_attr targets are its own attributes.

        Raises LayerError where it takes more than one tensor, or cannot be traced.
        """
        key = (_kind(layer), rank, dtype)
        if key not in self._bare:
            self._bare[key] = _trace(layer, rank, shape, dtype)
        return self._bare[key]

    def uses(
        self, layer: nn.Module, rank: int, shape: Sequence[int] | None, dtype: torch.dtype
    ) -> frozenset[tuple[str, str]]:
        """Attribute and kind of use of every weight in the layer's own forward. Raises LayerError as `bare`."""
        key = (_kind(layer), rank, dtype)
        if key not in self._uses:
            graph = self.bare(layer, rank, shape, dtype)
            names = {str(n.target): (str(n.target),) for n in graph.nodes if n.op == "get_attr"}
            sites = View(graph, names, self.ops).sites
            self._uses[key] = frozenset((site.key.owner, site.kind) for site in sites)
        return self._uses[key]

    def adapted(
        self,
        layer: nn.Module,
        pieces: Sequence[Piece],
        names: Mapping[str, str],
        tensors: Mapping[str, Tensor],
        seen: Mapping[int, tuple[int, ...]],
        dtype: torch.dtype,
    ) -> type[nn.Module]:
        """The class that computes what the pieces make of the layer, a subclass of its own.

        names: attribute path in the layer -> name in the program, of its own weights and of what passes add.
        """
        key = (_kind(layer), tuple(sorted(seen)), dtype, _key(pieces, names))
        if key not in self._classes:
            # The same layer may be fed flattened rows at another time (experts, beams).
            unseen = dict.fromkeys((2, 3), ()) if isinstance(layer, nn.Linear) else {}
            forwards: dict[tuple[bool, int], Forward] = {}
            for rank, shape in {**unseen, **seen}.items():
                try:
                    bare = self.bare(layer, rank, shape or None, dtype)
                    graphs = [self._rewritten(bare, pieces, names, tensors, mode) for mode in (False, True)]
                except Exception:
                    if rank in seen:
                        raise
                    continue  # a pass that needs a sequence, say: an input of this rank is refused when it comes
                for training, graph in zip((False, True), graphs, strict=True):
                    forwards[training, rank] = _compile(graph, type(layer).__name__)
            self._classes[key] = _subclass(type(layer), forwards, [p.entry.id for p in pieces])
        return self._classes[key]

    def _rewritten(
        self,
        bare: fx.Graph,
        pieces: Sequence[Piece],
        names: Mapping[str, str],
        tensors: Mapping[str, Tensor],
        training: bool,
    ) -> fx.Graph:
        graph = copy_graph(bare)
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = names[str(node.target)]
        weights = {n: (n,) for n in names.values()}
        cache = MetaCache(graph)
        for piece in pieces:
            view = View(graph, weights, self.ops, training=training)
            use = (piece.owner, piece.record.key.kind)
            site = next((s for s in view.sites if (s.key.owner, s.kind) == use), None)
            if site is None:
                raise LayerError(f"it holds the weight of {piece.record.path}, but does not use it itself")
            site = site.deciding(piece.record.decided)
            alone = replace(piece.entry, sites=(piece.record,))
            rewrite_entry(alone, piece.pass_, graph, cache, [site], tensors, view)
        graph = without_replaced(graph)
        own = {name: path for path, name in names.items()}
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = own[str(node.target)]
        graph.lint()
        return graph


def _kind(layer: nn.Module) -> Any:
    """What two layers have in common that compute the same, but for the values of their tensors."""
    tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    plain = (bool, int, float, str, tuple, torch.dtype, type(None))
    facts = [
        (key, str(value))
        for key, value in vars(layer).items()
        if isinstance(value, plain) and key != "training" and not key.startswith("__")
    ]
    return (
        type(layer),
        repr(layer),
        tuple((name, tuple(t.shape), t.dtype, str(t.device)) for name, t in tensors),
        tuple(sorted(facts)),
    )


def _key(pieces: Sequence[Piece], names: Mapping[str, str]) -> str:
    own = {name: path for path, name in names.items()}
    told = [
        [
            piece.entry.id, piece.entry.pass_name, piece.entry.weight, dict(piece.entry.options),
            dict(piece.record.decided), piece.record.key.kind,
            {name: own[full] for name, full in piece.record.tensors.items() if full in own},
        ]
        for piece in pieces
    ]  # fmt: skip
    return json.dumps(told, sort_keys=True, default=str)


def input_name(layer: nn.Module) -> str:
    """The name of the one tensor that the layer's forward needs. Raises LayerError."""
    if "forward" in vars(layer):
        raise LayerError(
            "its forward was replaced on the instance (a hook of accelerate, say); remove that first"
        )
    parameters = [*inspect.signature(type(layer).forward).parameters.values()][1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) != 1 or parameters[0] is not needed[0]:
        raise LayerError("its forward takes more than one tensor")
    return needed[0].name


def _trace(layer: nn.Module, rank: int, shape: Sequence[int] | None, dtype: torch.dtype) -> fx.Graph:
    name = input_name(layer)
    example, dynamic = _example(layer, rank, shape, dtype)
    training = layer.training
    try:
        layer.eval()
        with torch.enable_grad():
            program = torch.export.export(
                layer, (), {name: example}, dynamic_shapes={name: dynamic}, strict=False
            )
        gm = program.module(check_guards=False)
    except Exception as error:
        raise LayerError(
            f"it cannot be traced by itself ({type(error).__name__}: {error})".split("\n")[0]
        ) from error
    finally:
        layer.train(training)
    graph = copy_graph(gm.graph)
    graph.set_codegen(CodeGen())
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    value = output.args[0]
    while isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, fx.Node):
        raise LayerError("it returns more than one tensor")
    output.args = (value,)
    known = {n for n, _ in (*layer.named_parameters(), *layer.named_buffers())}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            raise LayerError(f"its forward makes a tensor of its own ({node.target})")
    return graph


# Sizes that no weight is likely to have, so that none is taken for another.
_SIZES = (3, 5, 7, 11, 13)


def _example(
    layer: nn.Module, rank: int, shape: Sequence[int] | None, dtype: torch.dtype
) -> tuple[Tensor, dict[int, Any]]:
    """An input, and its dimensions that may be of any size: all but features."""
    device = next((p.device for p in layer.parameters(recurse=False)), torch.device("cpu"))
    if isinstance(layer, nn.Linear):
        sizes = [*_SIZES[: rank - 1], layer.in_features]
        free = range(rank - 1)
    elif shape is None:
        raise LayerError("the example inputs never call it")
    elif isinstance(layer, nn.modules.conv._ConvNd):
        sizes, free = [3, *shape[1:]], range(1)
        free = [d for d in range(rank) if d != rank - layer.weight.dim() + 1]  # type: ignore[assignment]
    elif isinstance(layer, nn.Embedding) or not dtype.is_floating_point:
        sizes, free = [*_SIZES[:rank]], range(rank)
    else:
        sizes, free = [*_SIZES[: rank - 1], shape[-1]], range(rank - 1)
    example = torch.zeros(sizes, dtype=dtype, device=device)
    return example, dict.fromkeys(free, Dim.DYNAMIC)


def _compile(graph: fx.Graph, title: str) -> Forward:
    """The graph as a method: what it reads are attributes of self."""
    check_targets(graph)
    code = graph.python_code("self")
    where = f"<surgery {title} {next(_serial)}>"
    linecache.cache[where] = (len(code.src), None, code.src.splitlines(keepends=True), where)
    space = dict(code.globals)
    exec(compile(code.src, where, "exec"), space)
    quantized = any(node.target in REMADE for node in graph.nodes)
    return recomputed(space["forward"]) if quantized else space["forward"]


def _subclass(
    cls: type[nn.Module], forwards: Mapping[tuple[bool, int], Forward], entries: Sequence[str]
) -> type[nn.Module]:
    """A subclass of a layer's class with the compiled forwards, by mode and rank of the input."""
    table = dict(forwards)

    def forward(self: Any, input: Tensor) -> Any:
        try:
            chosen = table[self.training, input.dim()]
        except KeyError:
            raise PassError(
                f"{', '.join(entries)}: this {cls.__name__} is adapted for inputs of "
                f"{' or '.join(str(r) for r in sorted({rank for _, rank in table}))} dimensions, and one of "
                f"{input.dim()} came; apply it with inputs that reach the layer so"
            ) from None
        return chosen(self, input)

    parameter = [*inspect.signature(cls.forward).parameters][1]
    if parameter != "input":
        forward = _renamed(forward, parameter)
    return derived(cls, forward)


def derived(cls: type[nn.Module], forward: Forward) -> type[nn.Module]:
    """A layer's class with another forward: it goes by the same name, and `surgery_base` is the class itself."""
    kept = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {**kept, "forward": forward, "surgery_base": cls})


def _renamed(forward: Forward, parameter: str) -> Forward:
    """The same, under the layer's own name for what enters it: callers may give it by keyword."""
    space: dict[str, Any] = {"inner": forward}
    exec(f"def forward(self, {parameter}): return inner(self, {parameter})", space)
    return space["forward"]
