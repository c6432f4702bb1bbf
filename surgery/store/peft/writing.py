"""Writes the adapters of a program as a PEFT checkpoint, if PEFT supports them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.common.errors import ExportError
from surgery.engine.contract.base import RewritePass
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.graph.ops import CONV, EMBEDDING, LINEAR
from surgery.graph.sites import Site
from surgery.passes.lora.lora import Lora
from surgery.passes.prefix.prefix import Prefix
from surgery.store.peft import tables
from surgery.store.peft.files import PROMPT, prefix, task_type, write

_METHODS = {"lora": "LORA", "ia3": "IA3", "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
_MIXED_LAYOUTS = (
    "PEFT has one fan_in_fan_out for all layers, but these weights are stored in both layouts; write a checkpoint "
    "for each target, or save the program"
)


def export_peft(program: Program, path: Any, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a directory that `PeftModel.from_pretrained` loads. The loaded model has the program's logits.

    Supported are LoRA in all its forms, IA³, prefixes with PEFT's options (--positions shift, over self-attention, no
    gate), and prompts. PiSSA becomes a plain LoRA of twice the rank, to which PEFT itself converts it. The weight of an
    application is multiplied into B. The MLP of a prefix is evaluated and not stored. Trained modules of the base are
    written as modules_to_save.

    Args:
        program: The program.
        path: Directory to write.
        overwrite: Replace an existing directory.

    Returns:
        The configuration that was written.

    Raises:
        ExportError: PEFT does not support an adapter; the message names the pass and the site.
        SurgeryError: The path exists, or writing fails.
    """
    program = _plain(program)
    live = live_entries(program.journal)
    if not live:
        raise ExportError(
            "export-peft: the program has no adapter; apply a pass, or write it with `surgery merge --format hf`"
        )
    names = {entry.pass_name for entry in live}
    unknown = next((e for e in live if e.pass_name not in _METHODS), None)
    if unknown is not None:
        raise ExportError(
            f"{unknown.id}: surgery cannot write {unknown.pass_name} as a PEFT checkpoint; it can write "
            f"{', '.join(_METHODS)}. Leave it out (--without) or "
            f"export to ONNX"
        )
    if len(names) > 1:
        raise ExportError(
            f"a PEFT checkpoint contains one method, but the program has {', '.join(sorted(names))}; write one for "
            f"each with --only"
        )
    base, method = program.base, names.pop()
    config: dict[str, Any] = {
        "peft_type": _METHODS[method],
        "task_type": task_type(base.loaded.module),
        "base_model_name_or_path": base.ref.removeprefix("hf:") or None,
        "inference_mode": True,
        "modules_to_save": None,
    }
    writers = {"lora": _lora, "ia3": _ia3, "prefix": _prefix, "prompt": _prompt}
    own, tensors = writers[method](program, live)
    saved = _trained_modules(program)
    config.update(own)
    if saved:
        if method in ("prefix", "prompt") and set(saved) - {"classifier", "score", "cls", "qa_outputs"}:
            raise ExportError(
                f"PEFT stores no weights of the base with a {method}, but {saved[0]} was trained; save the program, or "
                f"export it to ONNX"
            )
        config["modules_to_save"] = saved
        state = program.state()
        for module in saved:
            tensors.update(
                {n: t for n, t in state.items() if n.startswith(f"{module}.") and n not in program.tensors}
            )
    keyed = {name if name == PROMPT else prefix(_METHODS[method]) + name: t for name, t in tensors.items()}
    write(Path(path), config, keyed, overwrite)
    return config


def _plain(program: Program) -> Program:
    """The program with adapters in their simpler form, if they have one: prefixes without their MLP."""
    if any(
        isinstance(pass_ := pass_of(e, program.base.plugins), RewritePass) and pass_.simplify is not None
        for e in live_entries(program.journal)
    ):
        return program.merge(verify=False)
    return program


def _trained_modules(program: Program) -> list[str]:
    """Paths of the modules that own a trained parameter of the base."""
    found = []
    for name, tensor in program.changed.items():
        if isinstance(tensor, nn.Parameter) and not torch.equal(tensor, program.base.tensors[name]):
            module, _, _ = name.rpartition(".")
            if not module:
                raise ExportError(
                    f"PEFT stores whole modules, but {name}, which was trained, is in none; save the program instead"
                )
            found.append(module)
    return sorted(set(found))


def _site(program: Program, entry: Entry, record: Any) -> Site:
    """Site of a record in the base. Raises ExportError if it is not the weight of a module of the base."""
    site = program.base.sites.by_key.get(record.key)
    if site is None or record.path != record.key.owner.removesuffix(".weight"):
        raise ExportError(
            f"{entry.id} at {record.path}: PEFT adapts only modules of the base; merge the adapter, or save the "
            f"program"
        )
    return site.deciding(record.decided)


# -- LoRA


def _lora(program: Program, live: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of all LoRA entries as one LoRA, with a rank and an alpha for each module."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    layouts: set[str] = set()
    first = pass_of(live[0], program.base.plugins)
    assert isinstance(first, Lora)
    for entry in live:
        lora = pass_of(entry, program.base.plugins)
        assert isinstance(lora, Lora)
        for option in ("rslora", "dora", "dropout"):
            if getattr(lora, option) != getattr(first, option):
                raise ExportError(
                    f"{live[0].id} and {entry.id} differ in {option}, but PEFT has one value for all; write them "
                    f"separately with --only"
                )
        for record in entry.sites:
            site = _site(program, entry, record)
            if record.path in ranks:
                raise ExportError(
                    f"{entry.id} at {record.path}: there is a second LoRA; combine them first, or write them separately"
                )
            factors, rank = _factors(program, entry, record, site, lora)
            alphas[record.path] = lora.scale * (rank**0.5 if lora.rslora else rank)
            ranks[record.path] = rank
            tensors.update(factors)
            if site.kind == LINEAR:
                layouts.add(site.layout)
    if len(layouts) > 1:
        raise ExportError(_MIXED_LAYOUTS)
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        "lora_dropout": first.dropout,
        "fan_in_fan_out": layouts == {"io"},
        "bias": "none",
        "init_lora_weights": True,
    }
    return config, tensors


def _most_common(values: Any) -> Any:
    """The most frequent value; of several the smallest."""
    listed = list(values)
    return max(sorted(set(listed)), key=listed.count)


def _exactly(path: str) -> str:
    """Pattern in PEFT's form that matches one module path and no other."""
    return "^" + path.replace(".", r"\.")


def _factors(
    program: Program, entry: Entry, record: Any, site: Site, lora: Lora
) -> tuple[dict[str, Tensor], int]:
    """Tensors of one LoRA by PEFT's names, and its rank."""
    path = record.path
    if site.kind not in (LINEAR, CONV, EMBEDDING) or (site.kind == CONV and site.groups > 1):
        raise ExportError(
            f"{entry.id} at {path}: PEFT has no LoRA for this {site.kind} weight; merge the adapter, or save the "
            f"program"
        )
    if lora.dora and entry.weight != 1:
        raise ExportError(
            f"{entry.id}: its weight of {entry.weight:g} cannot be multiplied into the tensors of a DoRA; set the "
            f"weight to 1"
        )
    own = {name: program.tensors[full].detach() for name, full in record.tensors.items()}
    rows = site.decided.get("rows") or {}
    if rows:
        a, b = _whole(entry, site, own, rows)
    else:
        a, b = own["A"], own["B"]
    # On a packed weight PiSSA keeps its initial factors: the branch computes s(B A − B₀A₀).
    if any(name.startswith("A0") for name in own):
        start = {name.replace("0", "", 1): value for name, value in own.items() if name[1:2] == "0"}
        a0, b0 = _whole(entry, site, start, rows) if rows else (start["A"], start["B"])
        a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    if "residual" in own:
        a, b = _converted(program, site, own["residual"], a, b, lora.scale)
    b = b * entry.weight
    rank = int(a.shape[0])
    if site.kind == EMBEDDING:
        found = {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
    else:
        found = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    if "m" in own:
        found[f"{path}.lora_magnitude_vector"] = own["m"]
    return found, rank


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


def _converted(
    program: Program, site: Site, residual: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Factors of PiSSA on the original base: s(B A − B₀A₀), where W − residual = s·B₀A₀ has the same rank.

    B₀ and A₀ are recovered from W − residual by a singular value decomposition.
    """
    if site.kind != LINEAR:
        raise ExportError(
            f"PiSSA at {site.path}: PEFT supports it only on linear layers; merge the adapter instead"
        )
    weight = program.base.tensors[str(site.weight)].detach()
    lost = (weight.double() - residual.double()) / scale
    lost = lost if site.layout == "oi" else lost.t()
    u, s, v = torch.linalg.svd(lost, full_matrices=False)
    rank = a.shape[0]
    a0, b0 = (v[:rank]).to(a.dtype), (u[:, :rank] * s[:rank]).to(b.dtype)
    return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)


# -- IA³, prefix, prompt


def _ia3(program: Program, live: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of all IA³ entries; `feedforward_modules` have their inputs scaled."""
    tensors: dict[str, Tensor] = {}
    inputs: list[str] = []
    layouts: set[str] = set()
    for entry in live:
        for record in entry.sites:
            site = _site(program, entry, record)
            if site.kind != LINEAR or record.path in tensors:
                raise ExportError(
                    f"{entry.id} at {record.path}: PEFT supports one IA³ at a linear layer; leave this one out "
                    f"(--without), or save the program"
                )
            on_input = record.decided["axis"] == "i"
            own = {name: program.tensors[full].detach().flatten() for name, full in record.tensors.items()}
            scale = torch.ones(site.in_features if on_input else site.out_features, dtype=site.float_dtype)
            for part, features in (record.decided["rows"] or {"": slice(None)}).items():
                scale[features] = 1 + entry.weight * (own[f"scale_{part}" if part else "scale"] - 1)
            layouts.add(site.layout)
            if on_input:
                inputs.append(record.path)
            tensors[f"{record.path}.ia3_l"] = scale[None] if on_input else scale[:, None]
    if len(layouts) > 1:
        raise ExportError(_MIXED_LAYOUTS)
    paths = sorted(name.removesuffix(".ia3_l") for name in tensors)
    return {
        "target_modules": paths,
        "feedforward_modules": sorted(inputs),
        "fan_in_fan_out": layouts == {"io"},
        "init_ia3_weights": True,
    }, tensors


def _prefix(program: Program, live: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and table of a prefix."""
    entry = _only(live)
    tuned = pass_of(entry, program.base.plugins)
    assert isinstance(tuned, Prefix)
    if tuned.positions != "shift" or tuned.gate or tuned.over != "self":
        raise ExportError(
            f"{entry.id}: PEFT's prefixes shift positions, have no gate and act on self-attention; this one has "
            f"--positions {tuned.positions}, --over {tuned.over}{', --gate' if tuned.gate else ''}; save the program"
        )
    if any(len(record.decided["attentions"]) > 1 for record in entry.sites):
        raise ExportError(
            f"{entry.id}: one weight computes the keys of several attentions, which PEFT does not support; save the "
            f"program"
        )
    twice = task_type(program.base.loaded.module) == "SEQ_2_SEQ_LM"
    layers = [{n: program.tensors[r.tensors[n]].detach() for n in ("K", "V")} for r in entry.sites]
    heads, _, width = layers[0]["K"].shape
    table = tables.table_of(layers, twice)
    return {
        "num_virtual_tokens": tuned.tokens,
        "num_layers": len(layers),
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "num_transformer_submodules": 2 if twice else 1,
        "prefix_projection": False,
        "encoder_hidden_size": heads * width,
    }, {PROMPT: table}


def _prompt(program: Program, live: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and table of a prompt. For an encoder-decoder PEFT expects rows for the decoder too, not used."""
    entry = _only(live)
    (record,) = entry.sites
    if record.decided.get("at") != "ids":
        raise ExportError(
            f"{entry.id}: PEFT's prompts need token ids as input, which this model does not have; save the program"
        )
    (full,) = record.tensors.values()
    rows = program.tensors[full].detach()
    config: Any = program.base.loaded.module.config
    twice = task_type(program.base.loaded.module) == "SEQ_2_SEQ_LM"
    return {
        "num_virtual_tokens": rows.shape[0],
        "token_dim": rows.shape[1],
        "num_layers": getattr(config, "num_hidden_layers", 0),
        "num_attention_heads": getattr(config, "num_attention_heads", 0),
        "num_transformer_submodules": 2 if twice else 1,
        "prompt_tuning_init": "RANDOM",
    }, {PROMPT: torch.cat([rows, torch.zeros_like(rows)]) if twice else rows}


def _only(live: Sequence[Entry]) -> Entry:
    """The single entry. Raises ExportError if there are several."""
    if len(live) > 1:
        raise ExportError(
            f"a PEFT checkpoint contains one {live[0].pass_name}, but the program has {len(live)}; write them "
            f"separately with --only"
        )
    return live[0]
