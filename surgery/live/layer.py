"""Rewriting of single layers: traces a layer's forward, replays journal entries in its graph, and compiles it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.graph import CodeGen

from surgery.capture.devices import device_of, names_device, neutral, placed
from surgery.common.errors import PassError
from surgery.common.plugins import make_plugin_manager
from surgery.common.threads import one_at_a_time
from surgery.engine.contract.base import RewritePass
from surgery.engine.journal import Entry, SiteRecord
from surgery.engine.module import get
from surgery.engine.replay import rewrite_entry
from surgery.graph.fake import MetaCache
from surgery.graph.graphs import copy_graph, without_replaced
from surgery.graph.ops import WeightOp
from surgery.graph.view import View
from surgery.live.adapted import Code, Source, float_dtypes


@dataclass(frozen=True)
class Piece:
    """One entry at one layer.

    Attributes:
        entry: The journal entry.
        pass_: Its pass.
        record: Its record for the site.
        owner: First name of the weight in the site's key.
    """

    entry: Entry
    pass_: RewritePass
    record: SiteRecord
    owner: str


class LayerError(Exception):
    """A layer cannot be rewritten separately; the message is a clause with the reason."""


class Layers:
    """Cache of traced graphs and compiled classes, shared by all layers of the same kind.

    A pickled cache is empty, and takes the ops of the plugins that are installed where it is loaded.

    Args:
        ops: Ops that hold a weight; None for those of the installed plugins.
    """

    def __init__(self, ops: Mapping[Any, WeightOp] | None = None) -> None:
        self._ops = ops
        self._bare: dict[Any, fx.Graph] = {}
        self._uses: dict[Any, frozenset[tuple[str, str]]] = {}
        self._classes: dict[Any, type[nn.Module]] = {}

    @property
    def ops(self) -> Mapping[Any, WeightOp]:
        """Ops that hold a weight."""
        if self._ops is None:
            self._ops = make_plugin_manager().weight_ops
        return self._ops

    def __reduce__(self) -> Any:
        return Layers, ()

    def __deepcopy__(self, memo: Any) -> Layers:
        return self

    def bare(self, layer: nn.Module, rank: int, shape: Sequence[int] | None, dtype: torch.dtype) -> fx.Graph:
        """Graph of the layer's own forward in ATen ops; get_attr nodes name the layer's attributes.

        Args:
            layer: The layer.
            rank: Number of dimensions of its input.
            shape: Example shape of its input; None if unknown.
            dtype: Dtype of its input.

        Raises:
            LayerError: The forward takes more than one tensor, or cannot be traced.
        """
        key = (_kind(layer), rank, dtype)
        if key not in self._bare:
            self._bare[key] = _trace(layer, rank, shape, dtype)
        return self._bare[key]

    @one_at_a_time
    def uses(
        self, layer: nn.Module, rank: int, shape: Sequence[int] | None, dtype: torch.dtype
    ) -> frozenset[tuple[str, str]]:
        """(attribute, kind of use) of every weight in the layer's own forward.

        Args:
            layer: The layer.
            rank: Number of dimensions of its input.
            shape: Example shape of its input; None if unknown.
            dtype: Dtype of its input.

        Raises:
            LayerError: The forward takes more than one tensor, or cannot be traced.
        """
        key = (_kind(layer), rank, dtype)
        if key not in self._uses:
            graph = self.bare(layer, rank, shape, dtype)
            names = {str(n.target): (str(n.target),) for n in graph.nodes if n.op == "get_attr"}
            sites = View(graph, names, self.ops).sites
            self._uses[key] = frozenset((site.key.owner, site.kind) for site in sites)
        return self._uses[key]

    @one_at_a_time
    def adapted(
        self,
        layer: nn.Module,
        pieces: Sequence[Piece],
        names: Mapping[str, str],
        tensors: Mapping[str, Tensor],
        seen: Mapping[int, tuple[int, ...]],
        dtype: torch.dtype,
    ) -> type[nn.Module]:
        """A subclass of the layer's class whose forward includes the given entries.

        Args:
            layer: The layer.
            pieces: Entries that act at the layer, in journal order.
            names: Attribute path in the layer -> name in the program, for its own weights and for inserted tensors.
            tensors: Inserted tensors, by name in the program.
            seen: Rank -> shape of the inputs that the layer received on the example inputs.
            dtype: Dtype of its input.

        Raises:
            LayerError: The layer cannot be traced, or does not use the weight itself.
        """
        key = (_kind(layer), tuple(sorted(seen)), dtype, _key(pieces, names))
        if key not in self._classes:
            # A linear layer can also receive inputs of another rank, such as flattened rows for experts.
            unseen = dict.fromkeys((2, 3), ()) if isinstance(layer, nn.Linear) else {}
            sources: dict[tuple[bool, int], Source] = {}
            device = device_of(layer)
            named = False
            for rank, shape in {**unseen, **seen}.items():
                try:
                    bare = self.bare(layer, rank, shape or None, dtype)
                    graphs = [self._rewritten(bare, pieces, names, tensors, mode) for mode in (False, True)]
                except Exception:
                    if rank in seen:
                        raise
                    # A pass can require a sequence axis, say; an input of this rank is then refused at run time.
                    continue
                for training, graph in zip((False, True), graphs, strict=True):
                    there = placed(graph, device)
                    named = named or names_device(graph)
                    sources[training, rank] = Source.of(there, type(layer).__name__)
            code = Code(
                type(layer),
                sources,
                tuple(p.entry.id for p in pieces),
                tuple(dict.fromkeys(type(p.pass_).__module__ for p in pieces)),
                float_dtypes(layer, [n for n in names if n in layer._parameters or n in layer._buffers]),
                _Again(self, tuple(pieces), dict(names), dict(seen), dtype),
                device if named else None,
            )
            self._classes[key] = code.cls()
        return self._classes[key]

    def _rewritten(
        self,
        bare: fx.Graph,
        pieces: Sequence[Piece],
        names: Mapping[str, str],
        tensors: Mapping[str, Tensor],
        training: bool,
    ) -> fx.Graph:
        """The graph of one mode with the entries replayed."""
        graph = copy_graph(bare)
        # Passes work with names of the program; get_attr nodes are renamed back to attributes at the end.
        for node in graph.nodes:
            if node.op == "get_attr":
                if node.target not in names:
                    raise LayerError(f"its forward also runs a layer inside it, which has {node.target}")
                node.target = names[str(node.target)]
        weights = {n: (n,) for n in names.values()}
        cache = MetaCache(graph)
        for piece in pieces:
            view = View(graph, weights, self.ops, training=training)
            use = (piece.owner, piece.record.key.kind)
            site = next((s for s in view.sites if (s.key.owner, s.kind) == use), None)
            if site is None:
                raise LayerError(f"it has the weight of {piece.record.path}, but does not use it itself")
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


@dataclass(frozen=True)
class _Again:
    """Makes the class of a rewritten layer again, after the layer has been moved or converted to another dtype.

    Attributes:
        layers: The cache of classes.
        pieces: Entries that act at the layer.
        names: As for `Layers.adapted`.
        seen: As for `Layers.adapted`.
        dtype: Dtype of the layer's input before.
    """

    layers: Layers
    pieces: tuple[Piece, ...]
    names: Mapping[str, str]
    seen: Mapping[int, tuple[int, ...]]
    dtype: torch.dtype

    def __call__(self, live: nn.Module) -> type[nn.Module]:
        """The class for a live layer with its present dtypes and device.

        Raises:
            PassError: A pass does not act on weights of these dtypes.
        """
        cls: Any = type(live)
        own = cls.surgery_code.dtypes
        layer = without_passes(
            live, {n for record in self.pieces for n in record.record.tensors.values()}, self
        )
        dtype = self.dtype
        if dtype.is_floating_point and own:
            dtype = next(iter(float_dtypes(layer, own).values()))
        tensors = {full: get(live, name) for name, full in self.names.items()}
        try:
            return self.layers.adapted(layer, self.pieces, self.names, tensors, self.seen, dtype)
        except LayerError as error:
            raise PassError(
                f"{', '.join(p.entry.id for p in self.pieces)}: its layer cannot be converted to {dtype} ({error}); "
                f"convert the model first, and apply the passes then"
            ) from None


def without_passes(live: nn.Module, inserted: set[str], again: _Again) -> nn.Module:
    """A bare layer over the own tensors of a rewritten one.

    Args:
        live: The rewritten layer.
        inserted: Names in the program of the tensors that passes inserted.
        again: Knows the names of the layer's tensors.
    """
    base: Any = type(live).surgery_base  # type: ignore[attr-defined]
    layer = base.__new__(base)
    layer.__dict__.update(live.__dict__)
    added = {name.partition(".")[0] for name, full in again.names.items() if full in inserted}
    for kind in ("_parameters", "_buffers", "_modules"):
        held = getattr(live, kind)
        layer.__dict__[kind] = type(held)((n, t) for n, t in held.items() if n not in added)
    return layer


def _kind(layer: nn.Module) -> Any:
    """Key that is equal for two layers that compute the same function, apart from the values of their tensors."""
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
    """Key that is equal for entries that change two layers of a kind in the same way."""
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
    """Name of the single tensor argument of the layer's forward.

    Raises:
        LayerError: The forward takes more than one tensor, or was replaced on the instance.
    """
    if "forward" in vars(layer):
        raise LayerError(
            "its forward was replaced on the instance (by a hook of accelerate, for example); remove that first"
        )
    parameters = [*inspect.signature(type(layer).forward).parameters.values()][1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) != 1 or parameters[0] is not needed[0]:
        raise LayerError("its forward takes more than one tensor")
    return needed[0].name


def _trace(layer: nn.Module, rank: int, shape: Sequence[int] | None, dtype: torch.dtype) -> fx.Graph:
    """Trace a layer's forward with torch.export, with all axes of its input dynamic except the features."""
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
        neutral(gm)
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
            raise LayerError(f"its forward creates a constant tensor ({node.target})")
    return graph


# Sizes that weights are unlikely to have, so that a dynamic axis is not mistaken for an axis of a weight.
_SIZES = (3, 5, 7, 11, 13)


def _example(
    layer: nn.Module, rank: int, shape: Sequence[int] | None, dtype: torch.dtype
) -> tuple[Tensor, dict[int, Any]]:
    """An input for a layer, and its dynamic axes: all except those of the features."""
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
