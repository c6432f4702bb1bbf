"""Writes a prefix or a prompt in PEFT's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.common.errors import ExportError
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.replay import pass_of
from surgery.passes.prefix.prefix import Prefix
from surgery.store.peft import tables
from surgery.store.peft.files import PROMPT, task_type


def write_prefix(
    program: Program, live: Sequence[Entry]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
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
    return (
        {
            "num_virtual_tokens": tuned.tokens,
            "num_layers": len(layers),
            "num_attention_heads": heads,
            "token_dim": heads * width,
            "num_transformer_submodules": 2 if twice else 1,
            "prefix_projection": False,
            "encoder_hidden_size": heads * width,
        },
        {PROMPT: table},
        {},
    )


def write_prompt(
    program: Program, live: Sequence[Entry]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
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
    return (
        {
            "num_virtual_tokens": rows.shape[0],
            "token_dim": rows.shape[1],
            "num_layers": getattr(config, "num_hidden_layers", 0),
            "num_attention_heads": getattr(config, "num_attention_heads", 0),
            "num_transformer_submodules": 2 if twice else 1,
            "prompt_tuning_init": "RANDOM",
        },
        {PROMPT: torch.cat([rows, torch.zeros_like(rows)]) if twice else rows},
        {},
    )


def _only(live: Sequence[Entry]) -> Entry:
    """The single entry. Raises ExportError if there are several."""
    if len(live) > 1:
        raise ExportError(
            f"a PEFT checkpoint contains one {live[0].pass_name}, but the program has {len(live)}; write them "
            f"separately with --only"
        )
    return live[0]
