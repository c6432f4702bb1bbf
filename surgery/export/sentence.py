"""Export in the layout that `SentenceTransformer(DIR, backend="onnx")` loads.

The library runs onnx/model.onnx for the vectors of the tokens, and Pooling, Dense and the other modules itself, from
their files. So the ONNX file ends at the tokens, and the files of the modules lie beside it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.capture import trace
from surgery.capture.devices import HOME
from surgery.capture.hf_config import SENTENCE
from surgery.capture.sentence.modules import HIDDEN, SentenceEncoder
from surgery.common.errors import ExportError
from surgery.common.files import staged_directory
from surgery.engine.base import Base
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.export.onnx_file import ExportReport
from surgery.export.program import export_program
from surgery.store.hf import write_companions
from surgery.store.sentence import transformer_path, write_modules, write_sentence

MODEL = "onnx/model.onnx"


def export_sentence(program: Program, path: Any, *, overwrite: bool = False, **options: Any) -> ExportReport:
    """Write a sentence-transformers directory with an ONNX model.

    A program without adapters, merged or plain, also gets its weights as safetensors, so that the directory loads with
    any backend. Adapters and quantized weights of the transformers model are in the ONNX file alone.

    Args:
        program: a program of a model of sentence-transformers.
        path: the directory to write.
        overwrite: True replaces an existing directory.
        options: options of `export_program`.

    Returns:
        The report of the ONNX file. Its output is compared with the program's vectors of the tokens.

    Raises:
        ExportError: the base is another model, a pass changes a module that the library runs, or the parity check
            fails.
        SurgeryError: the path exists, or writing fails.
    """
    module = program.base.loaded.module
    if not isinstance(module, SentenceEncoder):
        raise ExportError(
            f"a sentence-transformers directory needs a model of sentence-transformers, but the base is "
            f"{program.base.ref or type(module).__name__}; load it with --task {SENTENCE}"
        )
    program = program.to(HOME)
    _check_places(program, module)
    base, place = program.base, transformer_path(program.base)
    with staged_directory(Path(path), overwrite) as folder:
        state = program.state()
        if live_entries(program.journal):
            (folder / place).mkdir(exist_ok=True)
            (base.loaded.config or module.config).save_pretrained(folder / place)
            write_modules(base, module, state, folder)
        else:
            write_sentence(base, module, state, folder, None)
        write_companions(base, folder / place)
        report = export_program(_with_tokens(program, module), folder / place / MODEL, only=HIDDEN, **options)
    final = Path(path) / place / MODEL
    return replace(report, path=final, files=tuple(final.parent / file.name for file in report.files))


def _check_places(program: Program, module: SentenceEncoder) -> None:
    """Raise ExportError if a pass that is not merged changes what the library computes from the files of modules."""
    for entry in live_entries(program.journal):
        for record in entry.sites:
            if record.key.owner.split(".")[0] in module.stages:
                raise ExportError(
                    f"{entry.id} changes {record.path}, which the library runs from its own weights; merge it, or "
                    f"leave {record.path} out of its target"
                )


def _with_tokens(program: Program, module: SentenceEncoder) -> Program:
    """The program with the vectors of the tokens as a further output."""
    base = program.base
    module.with_tokens = True
    try:
        # The same weights and names, so that the journal fits this graph, too.
        captured = trace(base.loaded, check=False)
    finally:
        module.with_tokens = False
    longer = Base(
        base.loaded, captured, base.plugins, base.ref, base.options, base.consumed, set(base.released)
    )
    made = Program(longer, program.journal, program.tensors, program.changed)
    made.labels = dict(program.labels)
    return made
