"""Writes the LoRAs of a program in PEFT's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.common.errors import ExportError
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.replay import pass_of
from surgery.graph.ops import CONV, EMBEDDING, LINEAR, arguments
from surgery.graph.sites import Site
from surgery.passes.algebra import factor
from surgery.passes.lora.lora import Lora
from surgery.store.peft.places import TIMES_OF_OUT_PROJ, adapts_module, site_of, targets


@dataclass
class _Adapted:
    """One module or parameter with a LoRA in PEFT's form.

    Attributes:
        where: Path of the module, or name of the parameter if PEFT adapts no module of this class.
        module: True for a module.
        a: lora_A, with one row for each rank.
        b: lora_B, with one column for each rank.
        scale: Factor of B A.
        more: Further tensors, by the end of their names.
    """

    where: str
    module: bool
    a: Tensor
    b: Tensor
    scale: float
    more: dict[str, Tensor] = field(default_factory=dict)
    embedding: bool = False

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The tensors by their names in the checkpoint, at a path."""
        names = ("embedding_A", "embedding_B") if self.embedding else ("A.weight", "B.weight")
        found = dict(zip(names, (self.a, self.b), strict=True)) | self.more
        return {f"{path}.lora_{name}": tensor for name, tensor in found.items()}


def write_lora(
    program: Program, live: Sequence[Entry]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Configuration and tensors of all LoRA entries as one LoRA, with a rank and an alpha for each module.

    Also the path of each adapted module, with the path of its own weights in the checkpoint.
    """
    first = pass_of(live[0], program.base.plugins)
    assert isinstance(first, Lora)
    found: dict[str, _Adapted] = {}
    layouts: set[str] = set()
    for entry in live:
        lora = pass_of(entry, program.base.plugins)
        assert isinstance(lora, Lora)
        for option in ("rslora", "dora", "dropout", "bias"):
            if getattr(lora, option) != getattr(first, option):
                raise ExportError(
                    f"{live[0].id} and {entry.id} differ in {option}, but PEFT has one value for all; write them "
                    f"separately with --only"
                )
        for record in entry.sites:
            site = site_of(program, entry, record)
            if record.path in found:
                raise ExportError(
                    f"{entry.id} at {record.path}: there is a second LoRA; combine them first, or write them separately"
                )
            found[record.path] = _adapted(program, entry, record, site, lora)
            if site.kind == LINEAR and found[record.path].module:
                layouts.add(site.layout)
    tensors, modules = _of_modules(program, found)
    parameters = {own.where: own for own in found.values() if not own.module}
    _check_parameters(first, parameters)
    for own in parameters.values():
        tensors.update(own.tensors(own.where.rpartition(".")[0]))
    ranks = {path: own.rank for path, own in (modules | parameters).items()}
    alphas = {
        path: own.scale * (own.rank**0.5 if first.rslora else own.rank)
        for path, own in (modules | parameters).items()
    }
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": targets(modules, program.base.loaded.module),
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        "lora_dropout": first.dropout,
        # PEFT corrects it for each layer by its class, and refuses it for parameters.
        "fan_in_fan_out": layouts == {"io"} and not parameters,
        "bias": "none",
        "lora_bias": first.bias,
        "init_lora_weights": True,
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
    _check_fan_in(program, modules, parameters)
    return (
        config,
        tensors,
        _own_weights(program, [*modules, *(name.rpartition(".")[0] for name in parameters)]),
    )


def _own_weights(program: Program, paths: Sequence[str]) -> dict[str, str]:
    """Path of each adapted module -> path of its own weights in the checkpoint."""
    found = {path: f"{path}.base_layer" for path in paths}
    for path in paths:
        if isinstance(program.base.loaded.module.get_submodule(path), nn.MultiheadAttention):
            found[f"{path}.out_proj"] = f"{path}.base_layer.out_proj.base_layer"
    return found


def _check_fan_in(program: Program, modules: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Raise ExportError where PEFT has fan_in_fan_out on, from the last layer, when it comes to the parameters."""
    if not parameters:
        return
    last = [
        (path, type(module).__name__)
        for path, module in program.base.loaded.module.named_modules()
        if path in modules and type(module).__name__ in ("Linear", "Conv1D")
    ]
    if last and last[-1][1] == "Conv1D":
        raise ExportError(
            f"lora at {min(parameters)}: PEFT adapts no parameter after a Conv1D such as {last[-1][0]}, which sets "
            f"fan_in_fan_out for all; write them separately, or save the program"
        )


def _of_modules(
    program: Program, found: dict[str, _Adapted]
) -> tuple[dict[str, Tensor], dict[str, _Adapted]]:
    """Tensors of the adapted modules, and what PEFT adapts at each; it adapts nn.MultiheadAttention as a whole."""
    root, tensors, modules = program.base.loaded.module, {}, {}
    for own in found.values():
        parent = own.where.rpartition(".")[0]
        whole = root.get_submodule(parent)
        if not own.module or isinstance(whole, nn.MultiheadAttention):
            continue
        if not isinstance(root.get_submodule(own.where), nn.MultiheadAttention):
            tensors.update(own.tensors(own.where))
            modules[own.where] = own
    for path, module in root.named_modules():
        inner = found.get(f"{path}.in_proj_weight"), found.get(f"{path}.out_proj")
        if not isinstance(module, nn.MultiheadAttention) or inner == (None, None):
            continue
        given = [own for own in inner if own is not None]
        more = {name for own in given for name in own.more}
        if more:
            what = "has no DoRA for" if "magnitude_vector" in more else "leaves the bias of an update out in"
            raise ExportError(
                f"{path}: PEFT {what} nn.MultiheadAttention; merge the adapter, or save the program"
            )
        if module.in_proj_weight is None:
            raise ExportError(
                f"{path}: PEFT has no LoRA for an nn.MultiheadAttention whose queries, keys and values differ in size; "
                f"merge the adapter, or save the program"
            )
        rank, scale = max(own.rank for own in given), given[0].scale
        shapes = (module.in_proj_weight.shape, module.out_proj.weight.shape)
        parts = [
            _padded(own, shape, rank, scale, module.in_proj_weight)
            for own, shape in zip(inner, shapes, strict=True)
        ]
        parts[1].b = parts[1].b / TIMES_OF_OUT_PROJ
        tensors.update(parts[0].tensors(path))
        tensors.update(parts[1].tensors(f"{path}.base_layer.out_proj"))
        modules[path] = parts[0]
    return tensors, modules


def _padded(own: _Adapted | None, shape: Sequence[int], rank: int, scale: float, like: Tensor) -> _Adapted:
    """A LoRA with another rank and scale and the same product; zeros if there is none."""
    if own is None:
        return _Adapted("", True, like.new_zeros(rank, shape[1]), like.new_zeros(shape[0], rank), scale)
    missing = rank - own.rank
    a = torch.nn.functional.pad(own.a, (0, 0, 0, missing))
    b = torch.nn.functional.pad(own.b * (own.scale / scale), (0, missing))
    return _Adapted(own.where, True, a, b, scale, own.more)


def _check_parameters(lora: Lora, parameters: dict[str, _Adapted]) -> None:
    """Raise ExportError for options with which PEFT adapts modules only, and for parameters that it would nest."""
    if not parameters:
        return
    name = min(parameters)
    for option, given in (("--dropout", lora.dropout), ("--dora", lora.dora), ("--bias", lora.bias)):
        if given:
            raise ExportError(
                f"lora at {name}: PEFT adapts this as a parameter, for which it has no {option}; merge the adapter, or "
                f"save the program"
            )
    owners = [parameter.rpartition(".")[0] for parameter in parameters]
    twice = next((owner for owner in owners if not owner or owners.count(owner) > 1), None)
    if twice is not None:
        raise ExportError(
            f"lora at {twice or name}: surgery writes one parameter of a module for PEFT, and none of the model "
            f"itself; merge the adapter, or save the program"
        )


def _most_common(values: Any) -> Any:
    """The most frequent value; of several the smallest."""
    listed = list(values)
    return max(sorted(set(listed)), key=listed.count)


def _exactly(path: str) -> str:
    """Pattern in PEFT's form that matches one module path and no other."""
    return "^" + path.replace(".", r"\.")


def _adapted(program: Program, entry: Entry, record: Any, site: Site, lora: Lora) -> _Adapted:
    """One LoRA in PEFT's form."""
    path, root = record.path, program.base.loaded.module
    if site.kind not in (LINEAR, CONV, EMBEDDING):
        raise ExportError(
            f"{entry.id} at {path}: surgery cannot write a LoRA of {site.kind} weights as a PEFT checkpoint; merge the "
            f"adapter, or save the program"
        )
    if lora.dora and entry.weight != 1:
        raise ExportError(
            f"{entry.id}: its weight of {entry.weight:g} cannot be multiplied into the tensors of a DoRA; set the "
            f"weight to 1"
        )
    own = {name: program.tensors[full].detach() for name, full in record.tensors.items()}
    rows = site.decided.get("rows") or {}
    a, b = _whole(entry, site, own, rows) if rows else (own["A"], own["B"])
    # On a packed weight PiSSA keeps its initial factors: the branch computes s(B A − B₀A₀).
    if any(name.startswith("A0") for name in own):
        start = {name.replace("0", "", 1): value for name, value in own.items() if name[1:2] == "0"}
        a0, b0 = _whole(entry, site, start, rows) if rows else (start["A"], start["B"])
        a, b = _less(site, (a, b), (a0, b0))
    if "residual" in own:
        # PEFT's base is the original one, so what the residual lacks is taken from the update.
        a, b = _less(site, (a, b), _start_of(program, site, own["residual"], a, lora.scale))
    scale = lora.scale
    b = b * entry.weight
    if site.kind == CONV:
        a, scale = _of_convolution(entry, site, a, lora)
    owner, _, leaf = site.key.owner.rpartition(".")
    module = leaf == "weight" and adapts_module(root, owner)
    # Attention's own projection has no forward: PEFT adapts the attention, see _of_modules.
    attention = leaf == "in_proj_weight" and isinstance(root.get_submodule(owner), nn.MultiheadAttention)
    if not (module or attention) and site.kind != LINEAR:
        raise ExportError(
            f"{entry.id} at {path}: PEFT has no LoRA for {type(root.get_submodule(owner)).__name__}; merge the "
            f"adapter, or save the program"
        )
    if not module and not attention and site.layout == "io":
        a, b = b.t(), a.t()  # PEFT takes every matrix as (out, in)
    found = _Adapted(path if module or attention else site.key.owner, module or attention, a, b, scale)
    found.embedding = site.kind == EMBEDDING
    if attention:
        found.where = path
    if "m" in own:
        ones = [1] * (len(site.float_shape) - 2)
        found.more["magnitude_vector"] = own["m"].view(1, -1, *ones) if site.kind == CONV else own["m"]
    if "b" in own:
        found.more["B.bias"] = own["b"] * entry.weight
    return found


def _of_convolution(entry: Entry, site: Site, a: Tensor, lora: Lora) -> tuple[Tensor, float]:
    """lora_A of a convolution, and the scale of its update. PEFT's A reads the channels of all groups."""
    dilation = arguments(site.calls[0].node).get("dilation", 1)
    if set(dilation if isinstance(dilation, (list, tuple)) else [dilation]) != {1}:
        raise ExportError(
            f"{entry.id} at {site.path}: PEFT's LoRA leaves the dilation of a convolution out; merge the adapter, or "
            f"save the program"
        )
    groups, channels = site.groups, site.float_shape[1]
    if groups == 1 or lora.across:
        return a, lora.scale
    if lora.dora:
        raise ExportError(
            f"{entry.id} at {site.path}: PEFT's DoRA of a grouped convolution mixes its groups; merge the adapter, or "
            f"save the program"
        )
    rank = a.shape[0] // groups
    wide = a.new_zeros(a.shape[0], groups * channels, *a.shape[2:])
    for group in range(groups):
        own = slice(group * rank, (group + 1) * rank)
        wide[own, group * channels : (group + 1) * channels] = a[own]
    return wide, lora.scale


def _whole(entry: Entry, site: Site, own: dict[str, Tensor], rows: Any) -> tuple[Tensor, Tensor]:
    """Factors of the parts of a fused projection as one pair: A is stacked, B has a block for each part."""
    if "m" in own or any(name.startswith("m_") for name in own):
        raise ExportError(
            f"{entry.id} at {site.path}: PEFT's DoRA needs all of a fused projection, but this adapts a part; merge "
            f"the adapter, or save the program"
        )
    a = torch.cat([own[f"A_{part}"] for part in rows])
    b = torch.zeros(site.out_features, a.shape[0], dtype=a.dtype)
    column = 0
    for part, features in rows.items():
        width = own[f"A_{part}"].shape[0]
        b[list(features), column : column + width] = own[f"B_{part}"]
        column += width
    return a, b


def _less(site: Site, own: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of B A − B₀ A₀. Those of a grouped convolution are side by side in each group."""
    groups = site.groups
    rows = [a.reshape(groups, a.shape[0] // groups, *a.shape[1:]) for a in (own[0], start[0])]
    return torch.cat(rows, 1).flatten(0, 1), torch.cat([own[1], -start[1]], 1)


def _start_of(
    program: Program, site: Site, residual: Tensor, a: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The factors with which PiSSA started, up to a rotation: W − residual = s·B₀ A₀ has their rank."""
    weight = program.base.tensors[str(site.weight)].detach()
    lost = factor.matrices(site, weight.double() - residual.double()) / scale
    u, s, v = torch.linalg.svd(lost, full_matrices=False)
    rank = a.shape[0] // site.groups
    pair = v[:, :rank], u[:, :, :rank] * s[:, None, :rank]
    a0, b0 = factor.as_stored(site, *pair) if site.kind == CONV else (pair[0][0], pair[1][0])
    return a0.to(a.dtype), b0.to(a.dtype)
