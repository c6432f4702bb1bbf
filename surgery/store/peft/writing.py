"""What a program carries as a PEFT checkpoint, where PEFT has it."""

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


def export_peft(program: Program, path: Any, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a directory that `PeftModel.from_pretrained` loads, with the logits of the program. Returns the config.

    LoRA in all its forms (PiSSA as a plain LoRA of twice the rank, which is what PEFT itself converts it to; a weight
    w is multiplied into B), IA³, prefixes as PEFT has them (--positions shift, over self-attention, no gate; an MLP is
    computed once), prompts. What was trained of the base goes with it as modules_to_save.
    Raises ExportError, naming pass and site, for what PEFT cannot hold.
    """
    program = _plain(program)
    live = live_entries(program.journal)
    if not live:
        raise ExportError(
            "export-peft: the program carries no adapter; apply a pass, or write it with `surgery merge --format hf`"
        )
    names = {entry.pass_name for entry in live}
    unknown = next((e for e in live if e.pass_name not in _METHODS), None)
    if unknown is not None:
        raise ExportError(
            f"{unknown.id}: PEFT has no {unknown.pass_name}; it has {', '.join(_METHODS)}. Leave it out (--without), "
            f"or export to ONNX"
        )
    if len(names) > 1:
        raise ExportError(
            f"a PEFT checkpoint holds one method, and the program has {', '.join(sorted(names))}; write one for each, "
            f"with --only"
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
                f"PEFT stores no weights of the base with a {method}, and {saved[0]} was trained"
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
    """With what has a plainer form in that: an MLP that makes prefixes."""
    if any(
        isinstance(pass_ := pass_of(e, program.base.plugins), RewritePass) and pass_.simplify is not None
        for e in live_entries(program.journal)
    ):
        return program.merge(verify=False)
    return program


def _trained_modules(program: Program) -> list[str]:
    """Modules that directly hold a parameter of the base which is not as it was."""
    found = []
    for name, tensor in program.changed.items():
        if isinstance(tensor, nn.Parameter) and not torch.equal(tensor, program.base.tensors[name]):
            module, _, _ = name.rpartition(".")
            if not module:
                raise ExportError(f"PEFT stores whole modules, and {name} was trained, which is in none")
            found.append(module)
    return sorted(set(found))


def _site(program: Program, entry: Entry, record: Any) -> Site:
    site = program.base.sites.by_key.get(record.key)
    if site is None or record.path != record.key.owner.removesuffix(".weight"):
        raise ExportError(
            f"{entry.id} at {record.path}: PEFT adapts modules of the base, and this is none; fold it (merge), or save "
            f"the program"
        )
    return site.deciding(record.decided)


# -- LoRA


def _lora(program: Program, live: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
                    f"{live[0].id} and {entry.id} differ in {option}, which PEFT has once for all; write each alone, "
                    f"with --only"
                )
        for record in entry.sites:
            site = _site(program, entry, record)
            if record.path in ranks:
                raise ExportError(
                    f"{entry.id} at {record.path}: a second LoRA stands there; combine them first, or write each alone"
                )
            factors, rank = _factors(program, entry, record, site, lora)
            alphas[record.path] = lora.scale * (rank**0.5 if lora.rslora else rank)
            ranks[record.path] = rank
            tensors.update(factors)
            if site.kind == LINEAR:
                layouts.add(site.layout)
    if len(layouts) > 1:
        raise ExportError("PEFT's fan_in_fan_out is one for all layers, and these are stored in both ways")
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
    listed = list(values)
    return max(sorted(set(listed)), key=listed.count)


def _exactly(path: str) -> str:
    """A pattern of PEFT that fits a module path and no other."""
    return "^" + path.replace(".", r"\.")


def _factors(
    program: Program, entry: Entry, record: Any, site: Site, lora: Lora
) -> tuple[dict[str, Tensor], int]:
    path = record.path
    if site.kind not in (LINEAR, CONV, EMBEDDING) or (site.kind == CONV and site.groups > 1):
        raise ExportError(f"{entry.id} at {path}: PEFT has no LoRA on this {site.kind} weight")
    if lora.dora and entry.weight != 1:
        raise ExportError(
            f"{entry.id}: DoRA's weight of {entry.weight:g} cannot be multiplied into its tensors"
        )
    own = {name: program.tensors[full].detach() for name, full in record.tensors.items()}
    rows = site.decided.get("rows") or {}
    if rows:
        a, b = _whole(entry, site, own, rows)
    else:
        a, b = own["A"], own["B"]
    if any(name.startswith("A0") for name in own):  # of a packed weight
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
    """Factors of parts of a fused projection as one pair for all of it: A stacked, B by blocks."""
    if "m" in own or any(name.startswith("m_") for name in own):
        raise ExportError(
            f"{entry.id} at {site.path}: PEFT's DoRA takes all of a fused projection, and this a part"
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
    """PiSSA on the base as it was: s(B A − B₀A₀), where W − residual = s·B₀A₀ is of the same rank."""
    if site.kind != LINEAR:
        raise ExportError(
            f"PiSSA at {site.path}: only on a linear layer has PEFT a form for it; merge instead"
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
    tensors: dict[str, Tensor] = {}
    inputs: list[str] = []
    layouts: set[str] = set()
    for entry in live:
        for record in entry.sites:
            site = _site(program, entry, record)
            if site.kind != LINEAR or record.path in tensors:
                raise ExportError(
                    f"{entry.id} at {record.path}: PEFT has no second IA³, nor one on {site.kind}"
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
        raise ExportError("PEFT's fan_in_fan_out is one for all layers, and these are stored in both ways")
    paths = sorted(name.removesuffix(".ia3_l") for name in tensors)
    return {
        "target_modules": paths,
        "feedforward_modules": sorted(inputs),
        "fan_in_fan_out": layouts == {"io"},
        "init_ia3_weights": True,
    }, tensors


def _prefix(program: Program, live: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    entry = _only(live)
    tuned = pass_of(entry, program.base.plugins)
    assert isinstance(tuned, Prefix)
    if tuned.positions != "shift" or tuned.gate or tuned.over != "self":
        raise ExportError(
            f"{entry.id}: PEFT's prefixes shift positions, have no gate, and stand before self-attentions; this one "
            f"has --positions {tuned.positions}, --over {tuned.over}{', --gate' if tuned.gate else ''}"
        )
    if any(len(record.decided["attentions"]) > 1 for record in entry.sites):
        raise ExportError(
            f"{entry.id}: one weight makes the keys of several attentions, which PEFT does not know"
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
    entry = _only(live)
    (record,) = entry.sites
    if record.decided.get("at") != "ids":
        raise ExportError(f"{entry.id}: PEFT's prompts stand before token ids, and this model has none")
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
    if len(live) > 1:
        raise ExportError(
            f"a PEFT checkpoint holds one {live[0].pass_name}, and the program has {len(live)}; write each with --only"
        )
    return live[0]
