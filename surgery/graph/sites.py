"""Sites: the places where a program uses a weight, found in its graph and identified by the weight's name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.graph import ops as weight_ops
from surgery.graph.marks import is_aux, is_superseded
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, Call, WeightOp
from surgery.graph.packed import unpacking


@dataclass(frozen=True)
class SiteKey:
    """Identifies a site in the journal, independently of node names.

    Attributes:
        owner: Name of the parameter; if the weight is computed, the path of the module.
        kind: Kind of use, such as "linear".
        ordinal: Number of the use, among uses of one owner that differ in kind or layout. All calls of one module
            belong to one site.
    """

    owner: str
    kind: str
    ordinal: int = 0

    def to_json(self) -> dict[str, Any]:
        """The key as JSON-able data."""
        return {"owner": self.owner, "kind": self.kind, "ordinal": self.ordinal}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SiteKey:
        """The key of data that `to_json` returned."""
        return SiteKey(data["owner"], data["kind"], int(data["ordinal"]))


class Measurements(Protocol):
    """Interface of `engine.probe.Probe`: tensors and measurements while a pass is planned or applied.

    This package must not import the engine, so `view`, `journal`, `captured` and `program` are untyped here.
    """

    given: bool
    data: Sequence[Any]
    program: Any

    @property
    def view(self) -> Any: ...

    @property
    def in_memory(self) -> bool: ...

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def journal(self) -> Any: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def captured(self) -> Any: ...

    def tensor(self, name: str) -> Tensor: ...

    def weight(self, site: Site) -> Tensor: ...

    def dequantized(self, site: Site) -> Tensor: ...

    def stored(self, site: Site) -> Tensor: ...

    def inputs(self, site: Site) -> list[Tensor]: ...

    def products(self, site: Site) -> Tensor: ...

    def largest(self, site: Site) -> Tensor: ...

    def values(self, nodes: Iterable[fx.Node | str]) -> dict[str, list[Tensor]]: ...

    def watch(self, names: set[str], see: Callable[[str, Any], Any]) -> None: ...

    def inputs_of_graph(self) -> Iterator[list[Any]]: ...

    def module(self) -> fx.GraphModule: ...

    def run(self, module: fx.GraphModule) -> None: ...

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any: ...

    def forget(self, key: Hashable) -> None: ...


@dataclass(frozen=True)
class Site:
    """A weight and all calls that use it.

    Attributes:
        key: Key of the site in the journal.
        path: Module path of the weight ("….query"); the full name of a parameter that is not called "weight".
        kind: Kind of use: linear, conv, embedding, experts or norm.
        calls: The ops that use the weight.
        weight: Name of the weight; None if it is computed.
        bias: Name of the bias; None if there is none or it is computed.
        shape: Shape of the weight as stored.
        dtype: Dtype of the weight as stored.
        layout: Axes of the weight by letter, such as "oi": o output, i input, e expert, v vocabulary, d embedding.
        role: Role that the analysis found, such as "attn.q", or "".
        cross: True for a projection of cross-attentions alone, whose keys come from another stream than the queries.
        tied: Other names of the same tensor.
        parts: For a fused projection, name of a part -> its output features.
        selected_parts: Parts that the target names; empty for all.
        decided: Decisions of the pass at the site.
        measured: Measurements on the program; None in a replay.
    """

    key: SiteKey
    path: str
    kind: str
    calls: tuple[Call, ...]
    weight: str | None
    bias: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    role: str = ""
    cross: bool = False
    tied: tuple[str, ...] = ()
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    selected_parts: tuple[str, ...] = ()
    decided: Mapping[str, Any] = field(default_factory=dict)
    measured: Measurements | None = field(default=None, compare=False, repr=False)

    @property
    def shown_role(self) -> str:
        """The role as text: "attn.q", or "attn.q (cross)"."""
        return f"{self.role} (cross)" if self.cross else self.role

    @property
    def probe(self) -> Measurements:
        """The program's tensors, activations and gradients, while a pass is planned or applied.

        Raises:
            PassError: A journal is being replayed, which measures nothing.
        """
        if self.measured is None:
            raise PassError(
                f"{self.path}: nothing can be measured when a journal is replayed; measure in `decide` and return the "
                f"result"
            )
        return self.measured

    @property
    def op(self) -> str:
        """Name of the op that uses the weight."""
        return str(self.calls[0].node.target)

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for other kinds."""
        return int(weight_ops.arguments(self.calls[0].node).get("groups", 1)) if self.kind == CONV else 1

    @property
    def bias_is_computed(self) -> bool:
        """True if the op adds a bias that is not a parameter, or if its calls add different ones."""
        given = [weight_ops.arguments(c.node).get(c.op.bias) if c.op.bias else None for c in self.calls]
        named = {str(c.bias.target) if c.bias is not None else None for c in self.calls}
        return len(named) > 1 or (named == {None} and any(bias is not None for bias in given))

    def size(self, axis: str) -> int:
        """Length of an axis of the weight, by its letter (o, i, e, v, d). For conv, i is the length per group."""
        return self.float_shape[self.layout.index(axis)]

    @property
    def packed(self) -> bool:
        """True if the op unpacks its weight, so that `shape` and `dtype` are those of the packed form."""
        return self.calls[0].op.dequantize is not None

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype of tensors that a pass adds here: that of the weight, or of the op's result if the weight is packed."""
        return self.calls[0].node.meta["val"].dtype if self.packed else self.dtype

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Shape of the weight that the op computes with: as stored, or as the op unpacks it."""
        if not self.packed:
            return self.shape
        call = self.calls[0]
        # The kernel sizes of a convolution cannot be read from its input and output.
        if self.kind == CONV:
            return tuple(unpacking(call).val.shape)
        ends = {"o": call.node, "d": call.node, "i": call.x}
        return tuple(
            int(ends[axis].meta["val"].shape[-1]) if axis in ends else self.shape[place]
            for place, axis in enumerate(self.layout)
        )

    @property
    def out_features(self) -> int:
        """Number of output features; for an embedding its width."""
        return self.size("d" if self.kind == EMBEDDING else "o")

    @property
    def in_features(self) -> int:
        """Number of input features; for an embedding the number of rows. For a convolution per group."""
        return self.size("v" if self.kind == EMBEDDING else "i")

    @property
    def computed_from(self) -> tuple[str, ...]:
        """Names of the tensors that a computed weight is computed from."""
        return self.calls[0].computed_from

    @property
    def parameters(self) -> int:
        """Number of values of the weight."""
        return _numel(self.shape)

    def deciding(self, decided: Mapping[str, Any]) -> Site:
        """The site with the decisions of a pass."""
        return replace(self, decided=dict(decided))


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


class SiteIndex:
    """All sites of a graph, in graph order.

    Args:
        graph: The graph.
        names: Parameter name -> all names of that tensor, including this one.
        ops: Ops that hold a weight.
        roles: Roles by site, if they are known.
        parts: Parts of fused projections by site, if they are known.
        cross: Sites of projections of cross-attentions.
    """

    def __init__(
        self,
        graph: fx.Graph,
        names: Mapping[str, tuple[str, ...]],
        ops: Mapping[Any, WeightOp],
        roles: Mapping[SiteKey, str] | None = None,
        parts: Mapping[SiteKey, Mapping[str, tuple[int, ...]]] | None = None,
        cross: Collection[SiteKey] = (),
    ) -> None:
        nodes = [n for n in graph.nodes if n.target in ops and not is_aux(n) and not is_superseded(n)]
        calls = weight_ops.find_calls(nodes, ops, lambda node: node.target in names)
        grouped: dict[str, list[list[Call]]] = defaultdict(list)
        for call in calls:
            variants = grouped[_owner(call, names)]
            for variant in variants:
                if (variant[0].kind, variant[0].layout) == (call.kind, call.layout):
                    variant.append(call)
                    break
            else:
                variants.append([call])
        self.sites: list[Site] = []
        self.by_key: dict[SiteKey, Site] = {}
        for owner, variants in grouped.items():
            for ordinal, variant in enumerate(variants):
                key = SiteKey(owner, variant[0].kind, ordinal)
                site = _site(
                    key, tuple(variant), names, (roles or {}).get(key, ""), (parts or {}).get(key, {})
                )
                if key in cross:
                    site = replace(site, cross=True)
                self.sites.append(site)
                self.by_key[key] = site
        order = {call.node: index for index, call in enumerate(calls)}
        self.sites.sort(key=lambda site: order[site.calls[0].node])

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def _owner(call: Call, names: Mapping[str, tuple[str, ...]]) -> str:
    """Name of the weight that identifies its site; of a tied weight, the name under the module that uses it."""
    if call.weight is None:
        return call.module_path
    aliases = names[str(call.weight.target)]
    if len(aliases) == 1:
        return aliases[0]
    prefix = call.module_path + "."
    return next((name for name in aliases if name.startswith(prefix)), str(call.weight.target))


def _site(
    key: SiteKey,
    calls: tuple[Call, ...],
    names: Mapping[str, tuple[str, ...]],
    role: str,
    parts: Mapping[str, tuple[int, ...]],
) -> Site:
    call = calls[0]
    if call.weight is None:
        value = weight_ops.arguments(call.node)[call.op.weights[0]].meta["val"]
        return Site(
            key, key.owner, call.kind, calls, None, None, tuple(value.shape), value.dtype, call.layout, role
        )
    value = call.weight.meta["val"]
    name = key.owner
    bias = None
    if call.bias is not None:
        aliases = names.get(str(call.bias.target), (str(call.bias.target),))
        bias = next((n for n in aliases if n.startswith(call.module_path + ".")), aliases[0])
    return Site(
        key=key,
        path=name.removesuffix(".weight"),
        kind=call.kind,
        calls=calls,
        weight=name,
        bias=bias,
        shape=tuple(value.shape),
        dtype=value.dtype,
        layout=call.layout,
        role=role,
        tied=tuple(n for n in names[str(call.weight.target)] if n != name),
        parts=parts,
    )


MATRIX_KINDS = (LINEAR, CONV, EMBEDDING, EXPERTS)
