"""Writes the adapters of a program as a PEFT checkpoint, if PEFT supports them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.capture.devices import HOME
from surgery.capture.sentence.modules import SentenceEncoder
from surgery.common.errors import ExportError
from surgery.engine.contract.base import RewritePass
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.passes.delta import Delta
from surgery.store.peft.factored import nearest_lora
from surgery.store.peft.files import PROMPT, prefix, task_type, write
from surgery.store.peft.loads import can_check, check_loads
from surgery.store.peft.whole import stored_whole
from surgery.store.peft.write_ia3 import write_ia3
from surgery.store.peft.write_lora import write_lora
from surgery.store.peft.write_source import original
from surgery.store.peft.write_tokens import write_prefix, write_prompt
from surgery.store.provenance import write_provenance

_METHODS = {"lora": "LORA", "ia3": "IA3", "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}


def export_peft(
    program: Program,
    path: Any,
    *,
    overwrite: bool = False,
    check: bool = True,
    as_lora: int | None = None,
) -> dict[str, Any]:
    """Write a directory that `PeftModel.from_pretrained` loads. The loaded model has the program's logits.

    Supported are LoRA in all its forms, IA³, prompts, and prefixes with PEFT's options (--positions shift, over
    self-attention, no gate). PiSSA becomes a plain LoRA of twice the rank, to which PEFT itself converts it. The weight
    of an application is multiplied into B. The MLP of a prefix is evaluated and not stored. Trained weights of the
    base, those of a delta, and heads that the base's files lack are written whole. A delta that was imported from a
    checkpoint and not trained since gives that checkpoint back as it came.

    Args:
        program: The program.
        path: Directory to write.
        overwrite: Replace an existing directory.
        as_lora: Write a delta as the nearest LoRA of this rank. None writes it whole, or gives its checkpoint back.
        check: Load the directory with PEFT, if it is installed, and compare the outputs on the example inputs.

    Returns:
        The configuration that was written.

    Raises:
        ExportError: PEFT does not support an adapter; the message names the pass and the site. Or PEFT does not load
            what was written.
        SurgeryError: The path exists, or writing fails.
    """
    if isinstance(program.base.loaded.model, SentenceEncoder):
        # PEFT would look for the layers in the transformers model, where they have other names.
        raise ExportError(
            "export-peft: the program is a whole sentence-transformers model, whose layers PEFT does not find by their "
            "names; merge it with --format hf, or train the adapter on hf:DIR without --task sentence-similarity"
        )
    program = program.to(HOME)
    if as_lora is not None:
        program = nearest_lora(program, as_lora)
    config, keyed, given_back = _contents(program)

    def checked(folder: Path) -> None:
        if check and can_check(program):
            check_loads(program, folder, given_back)
        write_provenance(program, folder, "peft")

    write(Path(path), config, keyed, overwrite, checked)
    return config


def _contents(program: Program) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Configuration and tensors of the checkpoint by their names in the file; True if they are given back."""
    program = _plain(program)
    live = live_entries(program.journal)
    if not live:
        raise ExportError(
            "export-peft: the program has no adapter; apply a pass, or write it with `surgery merge --format hf`"
        )
    method = _method(live)
    if method == Delta.name:
        found = original(program, live)
        if isinstance(found, str):
            raise ExportError(
                f"{found}; write the nearest LoRA with --as-lora RANK, or merge it and write it with --format hf"
            )
        return *found, True
    return *_written(program, [entry for entry in live if entry.pass_name == method], method), False


def _method(live: Sequence[Entry]) -> str:
    """Name of the pass that determines the type of the checkpoint. Raises ExportError for passes that PEFT lacks."""
    names = [entry.pass_name for entry in live if entry.pass_name != Delta.name]
    unknown = next((e for e in live if e.pass_name not in (*_METHODS, Delta.name)), None)
    if unknown is not None:
        raise ExportError(
            f"{unknown.id}: surgery cannot write {unknown.pass_name} as a PEFT checkpoint; it can write "
            f"{', '.join(_METHODS)}. Leave it out (--without) or export to ONNX"
        )
    if len(set(names)) > 1:
        raise ExportError(
            f"a PEFT checkpoint contains one method, but the program has {', '.join(sorted(set(names)))}; write one "
            f"for each with --only"
        )
    return names[0] if names else Delta.name


def _written(
    program: Program, live: Sequence[Entry], method: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint of one of our methods, with the weights that PEFT has to store whole."""
    base = program.base
    writers = {"lora": write_lora, "ia3": write_ia3, "prefix": write_prefix, "prompt": write_prompt}
    own, tensors, adapted = writers[method](program, live)
    whole = stored_whole(program, adapted, task_type(base.loaded.module))
    config: dict[str, Any] = {
        "peft_type": _METHODS[method],
        "task_type": whole.task,
        "base_model_name_or_path": base.loaded.repo or base.ref.removeprefix("hf:") or None,
        **({"revision": base.loaded.commit} if base.loaded.commit else {}),
        "inference_mode": True,
        **own,
        "modules_to_save": whole.modules or None,
    }
    if whole.biases and method == "lora":
        config["bias"] = "lora_only"
    tensors.update(whole.tensors)
    start = prefix(_METHODS[method])
    return config, {name if name == PROMPT else start + name: t for name, t in tensors.items()}


def _plain(program: Program) -> Program:
    """The program with adapters in their simpler form, if they have one: prefixes without their MLP."""
    if any(
        isinstance(pass_ := pass_of(e, program.base.plugins), RewritePass) and pass_.simplify is not None
        for e in live_entries(program.journal)
    ):
        return program.merge(verify=False)
    return program
