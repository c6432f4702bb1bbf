"""Reads LoRA checkpoints: one pass for each pair of rank and alpha."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.common.errors import LoadError
from surgery.engine.contract.base import Pass
from surgery.engine.program import Program
from surgery.graph.ops import CONV, LINEAR
from surgery.graph.sites import Site
from surgery.passes.lora.lora import Lora
from surgery.store.peft.checkpoint import (
    apply_passes,
    check_paths,
    check_sizes,
    fresh,
    plan_of,
    put,
)
from surgery.store.peft.checkpoint_data import Checkpoint, Unread
from surgery.store.peft.files import AGAIN, by_pattern
from surgery.store.peft.places import TIMES_OF_OUT_PROJ
from surgery.store.peft.read_rest import token_rows

_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<what>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")
_OURS = {"A": "A", "B": "B", "embedding_A": "A", "embedding_B": "B", "magnitude_vector": "m"}
# Tensors that only training reads: what is left is a plain LoRA.
_OF_TRAINING = re.compile(r".+\.lora_(?:velora_|monteclora_).+")
# Options of PEFT's LoRA without a counterpart here -> the values that mean "not used".
_UNREAD: dict[str, tuple[Any, ...]] = {
    "layer_replication": (None,), "megatron_config": (None,), "alora_invocation_tokens": (None,),
    "use_qalora": (None, False), "arrow_config": (None,), "kasa_config": (None,),
}  # fmt: skip
# Values of init_lora_weights that initialize only the factors and leave the base weights unchanged.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "loftq", "mica", None)


@dataclass
class _Factors:
    """Tensors of a checkpoint: factors by path of the site and name in the pass, and those of whole weights."""

    by_path: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    # Path of a site -> path of PEFT's module or name of its parameter, which patterns of ranks and alphas match.
    modules: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    # Grouped convolutions whose A reads the channels of all groups.
    across: set[str] = field(default_factory=set)


def read_lora(given: Checkpoint, base: Program) -> Program:
    """Apply a LoRA checkpoint.

    Raises:
        Unread: It uses an option that no pass here has; the weights that PEFT merges may stand for it.
        LoadError: It was made for another base, or lacks tensors.
    """
    config = given.config
    for option, fine in _UNREAD.items():
        if config.get(option) not in fine:
            raise Unread(f"its option {option} = {str(config[option])[:100]} has no counterpart here")
    start = config.get("init_lora_weights", True)
    pissa = isinstance(start, str) and start.startswith("pissa")
    if not pissa and start not in _PLAIN_STARTS:
        raise Unread(f"with init_lora_weights = {start!r} PEFT changes base weights")
    found = _sorted(given, base)
    check_paths(given, base, found.by_path)
    sites = {site.path: site for site in base.sites}
    dora = bool(config.get("use_dora"))
    needed = {"A", "B", *(["m"] if dora else []), *(["b"] if config.get("lora_bias") else [])}
    groups: dict[tuple[int, float, bool], list[str]] = defaultdict(list)
    for path, own in found.by_path.items():
        if set(own) != needed:
            raise LoadError(
                f"{given.path}: at {path} it has {sorted(own)}, but needs {sorted(needed)}; {AGAIN}"
            )
        across = path in found.across
        rank, alpha = _rank_and_alpha(given, found.modules[path], sites[path], own, across)
        groups[rank, alpha, across].append(path)
    passes: list[Pass] = [
        Lora(
            target=",".join(f"path:{path}" for path in paths),
            rank=rank,
            alpha=alpha,
            rslora=bool(config.get("use_rslora")),
            dora=dora,
            bias="b" in needed,
            across=across,
            dropout=float(config.get("lora_dropout") or 0.0),
            **({"init": "pissa"} if pissa else {}),
            **{"as": given.named(number, len(groups))},
        )
        for number, ((rank, alpha, across), paths) in enumerate(groups.items(), 1)
    ]
    for pass_ in passes:
        check_sizes(given, plan_of(given, base, pass_), found.by_path)
    program = apply_passes(given, base, passes, found.rest)
    for entry in fresh(program, base, "lora"):
        for record in entry.sites:
            for name, value in found.by_path[record.path].items():
                put(given, program.tensors[record.tensors[name]], value, f"{record.path} {name}")
    return program


def _sorted(given: Checkpoint, base: Program) -> _Factors:
    """The tensors of a checkpoint by what they are."""
    found = _Factors()
    for name, tensor in given.tensors.items():
        match = _LORA.fullmatch(name)
        bias = name.removesuffix(".lora_B.bias")
        bare = name.replace(".base_layer.", ".")
        # PEFT also stores the weight of an adapted embedding itself; it is the base's.
        if bare != name and bare in base.base.tensors and torch.equal(base.base.tensors[bare], tensor):
            continue
        if match or bias != name:
            module, path = _place(given, base, match["path"] if match else bias)
            found.modules[path] = module
            found.by_path[path][_OURS[match["what"]] if match else "b"] = tensor
        elif _OF_TRAINING.fullmatch(name):
            continue
        elif name.endswith(".token_adapter.trainable_tokens_delta"):
            owner = name.removesuffix(".token_adapter.trainable_tokens_delta")
            found.rest[f"{owner}.weight"] = token_rows(given, base, owner, tensor)
        elif ".lora_" in name:
            raise Unread(f"its tensor {name} has no counterpart here")
        else:
            found.rest[bare] = tensor
    for path, own in found.by_path.items():
        site = next((site for site in base.sites if site.path == path), None)
        if site is not None:
            _as_ours(given, found.modules[path], site, own)
            if site.kind == CONV and site.groups > 1 and {"A", "B"} <= own.keys():
                inside = _within_groups(site, own["A"])
                if inside is None and given.config.get("use_dora"):
                    raise Unread(f"at {path} its DoRA mixes the {site.groups} groups of a convolution")
                if inside is None:
                    found.across.add(path)
                else:
                    own["A"] = inside
    return found


def _place(given: Checkpoint, base: Program, path: str) -> tuple[str, str]:
    """Path of PEFT's module or name of its parameter, and path of the site whose weight it adapts."""
    wanted = [name for name in given.config.get("target_parameters") or () if isinstance(name, str)]
    own = path.replace(".base_layer", "")
    try:
        module = base.base.loaded.module.get_submodule(own)
    except AttributeError:
        return own, own
    if isinstance(module, nn.MultiheadAttention):
        if all(site.path != f"{own}.in_proj_weight" for site in base.sites):
            raise Unread(
                f"the model reads the parts of {own}.in_proj_weight apart, so that no LoRA has all of it"
            )
        if given.config.get("lora_bias"):
            raise Unread(f"PEFT leaves the biases of the update of {own} out")
        return own, f"{own}.in_proj_weight"
    targeted = [
        leaf
        for leaf, _ in module.named_parameters(recurse=False)
        if any(f".{own}.{leaf}".endswith(f".{name}") for name in wanted)
    ]
    if len(targeted) > 1 or (targeted and own != path):
        # PEFT nests a wrapper for each parameter of a module, and names them by depth.
        raise Unread(f"{own} has several targeted parameters, which has no counterpart here")
    if targeted:
        parameter = f"{own}.{targeted[0]}"
        return parameter, parameter.removesuffix(".weight")
    # nn.MultiheadAttention's output projection is adapted together with its input projection.
    return own.removesuffix(".out_proj") if ".base_layer." in path else own, own


def _as_ours(given: Checkpoint, module: str, site: Site, own: dict[str, Tensor]) -> None:
    """Turn factors into the form that the pass has at a site, in place."""
    if not {"A", "B"} <= own.keys():
        return
    if site.path == f"{module}.out_proj":
        own["B"] = own["B"] * TIMES_OF_OUT_PROJ
    if module == site.key.owner:
        if site.kind != LINEAR:
            raise Unread(f"its target_parameters name {module}, a weight of kind {site.kind}")
        if site.layout == "io":  # PEFT takes every matrix as (out, in)
            own["A"], own["B"] = own["B"].t(), own["A"].t()
    blocks = given.config.get("use_bdlora")
    if isinstance(blocks, Mapping) and site.kind == LINEAR and own["A"].dim() == own["B"].dim() == 2:
        count = blocks.get("nblocks", 1)
        if type(count) is not int or not 0 < count <= max(own["A"].shape[0], 1):
            raise LoadError(f"{given.path}: its option use_bdlora has {count!r:.20} blocks; {AGAIN}")
        if own["A"].shape[1] * count == site.in_features and count > 1:
            own["A"] = torch.block_diag(*own["A"].chunk(count))
        if own["B"].shape[1] * count == own["A"].shape[0] and count > 1:
            own["B"] = torch.block_diag(*own["B"].chunk(count))


def _within_groups(site: Site, a: Tensor) -> Tensor | None:
    """A of a grouped convolution over the channels of its own groups; None if it reads others as well.

    PEFT's A is over the channels of all groups.
    """
    groups, channels = site.groups, site.float_shape[1]
    if a.dim() != len(site.float_shape) or a.shape[0] % groups or a.shape[1] != groups * channels:
        raise Unread(
            f"at {site.path} its lora_A has shape {tuple(a.shape)}, which no LoRA of {groups} groups has"
        )
    split = a.reshape(groups, a.shape[0] // groups, groups, channels, -1)
    inside = torch.stack([split[group, :, group] for group in range(groups)])
    if inside.count_nonzero() < a.count_nonzero():
        return None
    return inside.reshape(a.shape[0], channels, *a.shape[2:])


def _rank_and_alpha(
    given: Checkpoint, module: str, site: Site, own: Mapping[str, Tensor], across: bool
) -> tuple[int, float]:
    """Rank and alpha of the pass at a site. PEFT's rank of a grouped convolution is that of all groups together."""
    config = given.config
    alpha = by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    rank = by_pattern(config.get("rank_pattern") or {}, module, config.get("r"))
    shape = tuple(own["A"].shape)
    if rank is not None and shape[:1] != (rank,):
        raise LoadError(
            f"{given.path}: the configuration has rank {rank} at {site.path}, but lora_A has shape {shape}; {AGAIN}"
        )
    groups = 1 if across else site.groups
    return int(shape[0]) // groups, float(alpha) / (groups**0.5 if config.get("use_rslora") else groups)
