"""The tokenizer that goes with a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.capture.hf import silenced
from surgery.common.errors import MissingExtraError, TrainingError
from surgery.engine.program import Program

# Names of the files that tokenizers are saved in, whatever their kind; and their ends.
_PARTS, _ENDS = ("token", "vocab"), (".model", ".spm", ".bpe", ".codes", ".gguf")


def find_tokenizer(program: Program, given: str | None = None) -> Any:
    """The tokenizer of a directory, or that which lies with the program's model; None where there is none.

    Raises TrainingError where the directory given holds none, or what lies with the model cannot be read.
    """
    source = given or program.base.loaded.metadata.get("tokenizer")
    if source is None:
        return None
    found = _files(Path(source))
    if given is None and found == []:
        return None  # of an empty directory transformers makes a tokenizer that knows no word
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
        if given is None and found is None:
            return None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = f"--tokenizer {given}" if given else f"the tokenizer in {source} cannot be read"
        raise TrainingError(f"{what}: {reason[:200]}") from None


def _files(folder: Path) -> list[str] | None:
    """The names of a tokenizer's files in a directory; None where it is none."""
    if not folder.is_dir():
        return None
    names = [path.name for path in folder.iterdir()]
    return [name for name in names if name.endswith(_ENDS) or any(part in name for part in _PARTS)]
