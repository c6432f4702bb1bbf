"""Finds the tokenizer of a program."""

from __future__ import annotations

from collections.abc import Mapping
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
    loaded = program.base.loaded
    own = loaded.metadata.get("tokenizer")
    gguf = program.base.options.model_kwargs.get("gguf_file")
    return read_tokenizer(own, given, gguf, sentence=loaded.metadata.get("sentence"))


def read_tokenizer(
    own: str | None,
    given: str | None = None,
    gguf: str | None = None,
    *,
    sentence: Mapping[str, Any] | None = None,
) -> Any:
    """Load the tokenizer of a directory, or the one beside a model.

    Args:
        own: directory or name of the model, or None.
        given: directory or name of a tokenizer, or None for the model's own.
        gguf: name of the GGUF file in `own` that contains the model, or None.
        sentence: what sentence-transformers does with a text (Layout.text_settings), for its models.

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
            found_one = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)
            return found_one if sentence is None else _as_for_sentences(found_one, sentence)
    except Exception as error:
        if given is None and found is None:
            return None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        problem = (
            f"--tokenizer {given} cannot be read" if given else f"the tokenizer in {source} cannot be read"
        )
        raise TrainingError(f"{problem}: {reason[:200]}") from None


def _as_for_sentences(tokenizer: Any, sentence: Mapping[str, Any]) -> Any:
    """The tokenizer with the maximum length and the lower case that sentence-transformers gives it."""
    if sentence.get("longest"):
        tokenizer.model_max_length = int(sentence["longest"])
    if sentence.get("lowercase"):
        from tokenizers import normalizers

        core = tokenizer.backend_tokenizer
        # The library puts it before the tokenizer's own; where that has it too, it changes nothing.
        own = [] if core.normalizer is None else [core.normalizer]
        core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return tokenizer


def _files(folder: Path) -> list[str] | None:
    """Return the names of tokenizer files in a directory, or None if it is not a directory."""
    if not folder.is_dir():
        return None
    names = [path.name for path in folder.iterdir()]
    return [name for name in names if name.endswith(_ENDS) or any(part in name for part in _PARTS)]
