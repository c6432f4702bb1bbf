"""The tokenizer that goes with a program."""

from __future__ import annotations

from typing import Any

from surgery.capture.hf import silenced
from surgery.errors import MissingExtraError, TrainingError
from surgery.program import Program


def find_tokenizer(program: Program, given: str | None = None) -> Any:
    """The tokenizer of a directory, or that which lies with the program's model; None where there is none.

    Raises TrainingError where the directory given holds none.
    """
    source = given or program.base.loaded.metadata.get("tokenizer")
    if source is None:
        return None
    try:
        import transformers
    except ModuleNotFoundError:
        raise MissingExtraError("transformers", "hf") from None
    gguf = program.base.options.model_kwargs.get("gguf_file")
    more = {"gguf_file": gguf} if gguf and given is None else {}
    try:
        with silenced(transformers):
            return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)
    except Exception as error:
        if given is None:
            return None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TrainingError(f"--tokenizer {given}: {reason[:200]}") from None
