"""Reads checkpoints of prefix tuning and prompt tuning."""

from __future__ import annotations

from torch import Tensor

from surgery.common.errors import LoadError
from surgery.engine.program import Program
from surgery.passes.prefix.prefix import Prefix
from surgery.passes.prompt.prompt import Prompt
from surgery.store.peft import tables
from surgery.store.peft.checkpoint import apply_passes, check_sizes, fresh, plan_of, put
from surgery.store.peft.checkpoint_data import Checkpoint
from surgery.store.peft.files import AGAIN, PROMPT


def read_prefix(given: Checkpoint, base: Program) -> Program:
    """Apply a prefix-tuning checkpoint."""
    tokens = given.config["num_virtual_tokens"]
    twice = given.config.get("task_type") == "SEQ_2_SEQ_LM"
    prefix = Prefix(
        tokens=tokens,
        positions="shift",
        over="self",
        target="decoder" if twice else None,
        **{"as": given.label},
    )
    sites = [planned.site for planned in plan_of(given, base, prefix).accepted]
    shapes = [tuple(site.decided["attentions"][0]["k"]) for site in sites]
    table = _table(given, (tokens, sum(2 * h * w for h, w in shapes)))
    program = apply_passes(given, base, [prefix], _untabled(given))
    records = fresh(program, base, "prefix")[0].sites
    for record, own in zip(records, tables.prefixes(table, shapes, twice), strict=True):
        for name, value in own.items():
            put(given, program.tensors[record.tensors[name]], value, record.path)
    return program


def read_prompt(given: Checkpoint, base: Program) -> Program:
    """Apply a checkpoint of prompt tuning, or of p-tuning, whose encoder PEFT evaluates before it saves."""
    tokens = given.config["num_virtual_tokens"]
    # For an encoder-decoder model PEFT also stores rows for the decoder, which the model never reads.
    table = _table(given, None)[:tokens]
    prompt = Prompt(tokens=tokens, **{"as": given.label})
    planned = plan_of(given, base, prompt)
    check_sizes(given, planned, {s.site.path: dict.fromkeys(s.specs, table) for s in planned.accepted})
    program = apply_passes(given, base, [prompt], _untabled(given))
    (record,) = fresh(program, base, "prompt")[0].sites
    (name,) = record.tensors.values()
    put(given, program.tensors[name], table, record.path)
    return program


def _untabled(given: Checkpoint) -> dict[str, Tensor]:
    """Tensors of the checkpoint other than the table."""
    return {name: tensor for name, tensor in given.tensors.items() if name != PROMPT}


def _table(given: Checkpoint, shape: tuple[int, int] | None) -> Tensor:
    """The table of a prefix or prompt. Raises LoadError if it is missing or has another shape."""
    if PROMPT not in given.tensors:
        raise LoadError(f"{given.path} lacks the tensor {PROMPT}; {AGAIN}")
    table = given.tensors[PROMPT]
    if table.dim() != 2:
        raise LoadError(
            f"{given.path}: {PROMPT} has shape {tuple(table.shape)}, but must have 2 axes; {AGAIN}"
        )
    if shape is not None and tuple(table.shape) != shape:
        raise LoadError(
            f"{given.path} is for another base: {PROMPT} is {tuple(table.shape)}, but this one needs {shape}; load the "
            f"base that it was made for"
        )
    return table
