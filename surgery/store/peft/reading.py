"""Reads a PEFT checkpoint: applies the corresponding passes to a program of its base and copies the tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.common.errors import LoadError, PassError, SurgeryError, nearest
from surgery.common.readers import first_line
from surgery.engine.change.plans import PassPlan
from surgery.engine.contract.base import Pass
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.registry import find_pass
from surgery.passes.lora.lora import Lora
from surgery.passes.prefix.prefix import Prefix
from surgery.passes.prompt.prompt import Prompt
from surgery.passes.select.full import Full
from surgery.store.peft import tables
from surgery.store.peft.files import AGAIN, PROMPT, WEIGHTS, by_pattern, read
from surgery.store.peft.schema import check_names

_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<what>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")
_OURS = {"A": "A", "B": "B", "embedding_A": "A", "embedding_B": "B", "magnitude_vector": "m"}
# Options of PEFT's LoRA without a counterpart here -> the values that mean "not used".
_UNREAD: dict[str, tuple[Any, ...]] = {
    "layer_replication": (None,), "megatron_config": (None,), "alora_invocation_tokens": (None,),
    "lora_bias": (None, False), "target_parameters": (None, [], {}), "use_qalora": (None, False),
    "arrow_config": (None,), "use_bdlora": (None, False),
}  # fmt: skip
# Values of init_lora_weights that initialize only the factors and leave the base weights unchanged.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "loftq", None)


def import_peft(path: Any, base: Program, *, label: str = "") -> Program:
    """Apply a PEFT checkpoint to a program: LoRA, IA³, prefix tuning or prompt tuning.

    LoRA includes rsLoRA, DoRA, PiSSA, rank and alpha patterns, and modules_to_save.

    Args:
        path: Directory of the checkpoint.
        base: Program of the model that the checkpoint was made for, of the same class.
        label: Label of the passes. If ranks or alphas differ, there is a pass for each, with the labels label_1,
            label_2, …

    Returns:
        The program with the passes applied.

    Raises:
        LoadError: The checkpoint cannot be read, was made for another base, lacks tensors, or has a method or an
            option without a counterpart here.
    """
    config, tensors = read(Path(path))
    check_names(tensors, Path(path) / WEIGHTS, base)
    kind = str(config["peft_type"])
    readers = {"LORA": _lora, "IA3": _ia3, "PREFIX_TUNING": _prefix, "PROMPT_TUNING": _prompt}
    if kind not in readers:
        raise LoadError(
            f"{path}: PEFT's {kind} has no counterpart here; use a checkpoint of {', '.join(readers)}"
        )
    try:
        return readers[kind](_Checkpoint(str(path), config, tensors, label), base)
    except SurgeryError:
        raise
    except Exception as error:
        # The file is not trusted, and can have contents that raise any exception.
        raise LoadError(
            f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); {AGAIN}"
        ) from error


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint that has been read, and the label for its passes."""

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    label: str

    def named(self, number: int, count: int) -> str:
        """Label of one of `count` passes; numbers start at 1."""
        return self.label if count == 1 else f"{self.label or 'peft'}_{number}"


# -- LoRA


def _lora(given: _Checkpoint, base: Program) -> Program:
    """Apply a LoRA checkpoint: one pass for each pair of rank and alpha."""
    config = given.config
    for option, fine in _UNREAD.items():
        if config.get(option) not in fine:
            raise LoadError(
                f"{given.path}: its option {option} = {config[option]!r} has no counterpart here; merge it with PEFT"
            )
    start = config.get("init_lora_weights", True)
    pissa = isinstance(start, str) and start.startswith("pissa")
    if not pissa and start not in _PLAIN_STARTS:
        raise LoadError(
            f"{given.path}: with init_lora_weights = {start!r} PEFT changes base weights; convert the checkpoint with "
            f"PEFT's path_initial_model_for_weight_conversion"
        )
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    rest: dict[str, Tensor] = {}
    for name, tensor in given.tensors.items():
        match = _LORA.fullmatch(name)
        bare = name.replace(".base_layer.", ".")
        # PEFT also stores the weight of an adapted embedding itself; it is the base's.
        if bare != name and bare in base.base.tensors and torch.equal(base.base.tensors[bare], tensor):
            continue
        if match:
            factors[match["path"]][_OURS[match["what"]]] = tensor
        else:
            rest[bare] = tensor
    _check_paths(given, base, factors)
    dora = bool(config.get("use_dora"))
    needed = {"A", "B", "m"} if dora else {"A", "B"}
    groups: dict[tuple[int, float], list[str]] = defaultdict(list)
    for path, own in factors.items():
        if set(own) != needed:
            raise LoadError(
                f"{given.path}: at {path} it has {sorted(own)}, but needs {sorted(needed)}; {AGAIN}"
            )
        alpha = by_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
        rank = by_pattern(config.get("rank_pattern") or {}, path, config.get("r"))
        shape = tuple(own["A"].shape)
        if rank is not None and shape[:1] != (rank,):
            raise LoadError(
                f"{given.path}: the configuration has rank {rank} at {path}, but lora_A has shape {shape}; {AGAIN}"
            )
        groups[int(shape[0]), float(alpha)].append(path)
    passes: list[Pass] = [
        Lora(
            target=",".join(f"path:{path}" for path in paths),
            rank=rank,
            alpha=alpha,
            rslora=bool(config.get("use_rslora")),
            dora=dora,
            dropout=float(config.get("lora_dropout") or 0.0),
            **({"init": "pissa"} if pissa else {}),
            **{"as": given.named(number, len(groups))},
        )
        for number, ((rank, alpha), paths) in enumerate(groups.items(), 1)
    ]
    for pass_ in passes:
        _check_sizes(given, _planned(given, base, pass_), factors)
    program = _apply(given, base, passes, rest)
    for entry in _fresh(program, base, "lora"):
        for record in entry.sites:
            for name, value in factors[record.path].items():
                _put(given, program.tensors[record.tensors[name]], value, f"{record.path} {name}")
    return program


def _check_paths(given: _Checkpoint, base: Program, factors: Mapping[str, Any]) -> None:
    """Raise LoadError if the checkpoint adapts no module, or one that the base does not have."""
    if not factors:
        raise LoadError(f"{given.path} contains no tensors of {given.config['peft_type']}; {AGAIN}")
    known = {site.path for site in base.sites}
    missing = [path for path in factors if path not in known]
    if missing:
        raise LoadError(
            f"{given.path} is for another base: this one has no {missing[0]}{nearest(missing[0], sorted(known))}, nor "
            f"{len(missing) - 1} others of its {len(factors)}; load the base with the class (--task) and the model "
            f"({given.config.get('base_model_name_or_path') or 'unknown'}) that it was made for"
        )


def _saved_modules(given: _Checkpoint, base: Program, rest: Mapping[str, Tensor]) -> list[Pass]:
    """A selection that trains the parameters that PEFT stored whole (modules_to_save, biases), if there are any."""
    if not rest:
        return []
    unknown = [name for name in rest if name not in base.base.tensors]
    if unknown:
        raise LoadError(
            f"{given.path} contains {unknown[0]}, which this base does not have; load the base that it was made for"
        )
    for name, value in rest.items():
        own = base.base.tensors[name]
        if own.shape != value.shape:
            raise LoadError(
                f"{given.path} contains {name} {tuple(value.shape)}, but the base has {tuple(own.shape)}; give the "
                f"base the same sizes (--model-kwarg num_labels=…; new tokens with the pass vocab)"
            )
    names = [n for n in rest if isinstance(base.base.tensors[n], nn.Parameter)]
    return [Full(target=",".join(f"path:{name}" for name in names))] if names else []


# -- IA³


def _ia3(given: _Checkpoint, base: Program) -> Program:
    """Apply an IA³ checkpoint: one pass for scaled inputs, one for scaled outputs."""
    scales = {n.removesuffix(".ia3_l"): t for n, t in given.tensors.items() if n.endswith(".ia3_l")}
    rest = {n: t for n, t in given.tensors.items() if not n.endswith(".ia3_l")}
    _check_paths(given, base, scales)
    cls = find_pass(base.base.plugins, "ia3", "torch-surgery-ia3").cls
    sides = {"input": [p for p, t in scales.items() if t.shape[0] == 1 and t.shape[-1] != 1], "output": []}
    sides["output"] = [p for p in scales if p not in sides["input"]]
    wanted = {side: paths for side, paths in sides.items() if paths}
    passes: list[Pass] = [
        cls.parse(
            {
                "target": ",".join(f"path:{p}" for p in paths),
                "scale": side,
                "as": side if not given.label else f"{given.label}_{side}",
            }
        )
        for side, paths in wanted.items()
    ]
    for pass_ in passes:
        planned = _planned(given, base, pass_)
        values = {s.site.path: dict.fromkeys(s.specs, scales[s.site.path]) for s in planned.accepted}
        _check_sizes(given, planned, values)
    program = _apply(given, base, passes, rest)
    for entry in _fresh(program, base, "ia3"):
        for record in entry.sites:
            (name,) = record.tensors.values()
            _put(given, program.tensors[name], scales[record.path], record.path)
    return program


# -- prefix and prompt


def _prefix(given: _Checkpoint, base: Program) -> Program:
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
    sites = [planned.site for planned in _planned(given, base, prefix).accepted]
    shapes = [tuple(site.decided["attentions"][0]["k"]) for site in sites]
    table = _table(given, (tokens, sum(2 * h * w for h, w in shapes)))
    program = _apply(given, base, [prefix], _untabled(given))
    records = _fresh(program, base, "prefix")[0].sites
    for record, own in zip(records, tables.prefixes(table, shapes, twice), strict=True):
        for name, value in own.items():
            _put(given, program.tensors[record.tensors[name]], value, record.path)
    return program


def _prompt(given: _Checkpoint, base: Program) -> Program:
    """Apply a prompt-tuning checkpoint."""
    tokens = given.config["num_virtual_tokens"]
    # For an encoder-decoder model PEFT also stores rows for the decoder, which the model never reads.
    table = _table(given, None)[:tokens]
    prompt = Prompt(tokens=tokens, **{"as": given.label})
    planned = _planned(given, base, prompt)
    _check_sizes(given, planned, {s.site.path: dict.fromkeys(s.specs, table) for s in planned.accepted})
    program = _apply(given, base, [prompt], _untabled(given))
    (record,) = _fresh(program, base, "prompt")[0].sites
    (name,) = record.tensors.values()
    _put(given, program.tensors[name], table, record.path)
    return program


def _untabled(given: _Checkpoint) -> dict[str, Tensor]:
    """Tensors of the checkpoint other than the table."""
    return {name: tensor for name, tensor in given.tensors.items() if name != PROMPT}


def _table(given: _Checkpoint, shape: tuple[int, int] | None) -> Tensor:
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


# -- both


def _planned(given: _Checkpoint, base: Program, pass_: Pass) -> PassPlan:
    """The plan of a pass, which has the shapes of its tensors without allocating them."""
    try:
        return base.plan(pass_, freeze_base=False).passes[-1]
    except SurgeryError as error:
        raise LoadError(f"{given.path} does not fit this base: {error}") from error


def _check_sizes(given: _Checkpoint, planned: PassPlan, values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Compare the sizes of a checkpoint's tensors with those that a pass would add, before it adds them.

    Args:
        given: The checkpoint.
        planned: The plan of the pass.
        values: Path of a site -> the checkpoint's tensors there, by their names in the pass.

    Raises:
        LoadError: A tensor has another number of values.
    """
    for site in planned.accepted:
        for name, value in values.get(site.site.path, {}).items():
            spec = site.specs.get(name)
            if spec is not None and spec.numel() != value.numel():
                raise _other_size(given, f"{site.site.path} {name}", value.shape, spec.shape)


def _other_size(given: _Checkpoint, where: str, has: Sequence[int], fits: Sequence[int]) -> LoadError:
    """The error for a tensor of the wrong size."""
    return LoadError(
        f"{given.path} is for another base: at {where} it has {tuple(has)} instead of {tuple(fits)}; load the base "
        f"that it was made for"
    )


def _apply(given: _Checkpoint, base: Program, passes: list[Pass], rest: Mapping[str, Tensor]) -> Program:
    """Apply passes and copy the tensors that PEFT stored whole; all other parameters of the base are frozen."""
    try:
        # If an earlier checkpoint or pass has selected parameters, freezing again would stop its adapters.
        frozen = any(entry.kind == "select" for entry in base.journal)
        program = base.apply(*passes, *_saved_modules(given, base, rest), freeze_base=not frozen)
    except PassError as error:
        raise LoadError(f"{given.path} does not fit this base: {error}") from error
    except SurgeryError as error:
        raise LoadError(f"{given.path}: {error}") from error
    program.own()
    for name, value in rest.items():
        _put(given, program.changed[program.base.names.get(name, (name,))[0]], value, name)
    return program


def _fresh(program: Program, base: Program, name: str) -> list[Entry]:
    """Entries that were just applied; the base may have earlier ones of the same pass."""
    return [e for e in program.journal.entries[len(base.journal) :] if e.pass_name == name]


def _put(given: _Checkpoint, own: Tensor, value: Tensor, where: str) -> None:
    """Copy a tensor of the checkpoint; axes of size 1 may differ. Raises LoadError if it does not fit."""
    if own.numel() != value.numel() or sorted(s for s in own.shape if s > 1) != sorted(
        s for s in value.shape if s > 1
    ):
        raise _other_size(given, where, value.shape, own.shape)
    if own.is_floating_point() != value.is_floating_point():
        raise LoadError(
            f"{given.path}: at {where} it has {value.dtype}, but the base has {own.dtype}; {AGAIN}"
        )
    with torch.no_grad():
        own.copy_(value.reshape(own.shape))
