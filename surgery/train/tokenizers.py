"""Finds the tokenizer of a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.capture.hf_config import silenced
from surgery.common.errors import MissingExtraError, TrainingError
from surgery.engine.program import Program

# Parts and suffixes of the names of tokenizer files, of all kinds of tokenizers.
_PARTS, _ENDS = ("token", "vocab"), (".model", ".spm", ".bpe", ".codes", ".gguf")


def find_tokenizer(program: Program, given: str | None = None) -> Any:
    """Load the tokenizer of a directory, or the one beside the program's model.

    Args:
        program: the program.
        given: directory or name of a tokenizer, or None for the model's own.

    Returns:
        The tokenizer, or None if the model has none.

    Raises:
        TrainingError: a tokenizer cannot be loaded.
        MissingExtraError: transformers is not installed.
    """
    own = program.base.loaded.metadata.get("tokenizer")
    return read_tokenizer(own, given, program.base.options.model_kwargs.get("gguf_file"))


def read_tokenizer(own: str | None, given: str | None = None, gguf: str | None = None) -> Any:
    """Load the tokenizer of a directory, or the one beside a model.

    Args:
        own: directory or name of the model, or None.
        given: directory or name of a tokenizer, or None for the model's own.
        gguf: name of the GGUF file in `own` that contains the model, or None.

    Returns:
        The tokenizer, or None if the model has none.

    Raises:
        TrainingError: a tokenizer cannot be loaded.
        MissingExtraError: transformers is not installed.
    """
    source = given or own
    if source is None:
        return None
    found = _files(Path(source))
    if given is None and found == []:
        return None  # transformers would make a tokenizer with an empty vocabulary
    try:
        import transformers
    except ModuleNotFoundError:
        raise MissingExtraError("transformers", "hf") from None
    more = {"gguf_file": gguf} if gguf and given is None else {}
    try:
        with silenced(transformers):
            return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)
    except Exception as error:
        if given is None and found is None:
            return None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        problem = (
            f"--tokenizer {given} cannot be read" if given else f"the tokenizer in {source} cannot be read"
        )
        raise TrainingError(f"{problem}: {reason[:200]}") from None


def _files(folder: Path) -> list[str] | None:
    """Return the names of tokenizer files in a directory, or None if it is not a directory."""
    if not folder.is_dir():
        return None
    names = [path.name for path in folder.iterdir()]
    return [name for name in names if name.endswith(_ENDS) or any(part in name for part in _PARTS)]
