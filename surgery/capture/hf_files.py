"""The files of a transformers directory that are read or fetched, and those beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from surgery.common.errors import LoadError

GGUF = "gguf_file"
CONFIG = "config.json"

# Files of tokenizers and processors, by the names that transformers uses.
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "image_processor*.json",
)  # fmt: skip
_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))


def weight_files(folder: Path, keywords: Mapping[str, Any]) -> tuple[Path, ...]:
    """Weight and configuration files of a directory that transformers reads, in its order of preference.

    Args:
        folder: The directory.
        keywords: Arguments of `from_pretrained`: gguf_file, subfolder and variant decide.
    """
    folder = folder / str(keywords.get("subfolder") or "")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if keywords.get(GGUF):
        return tuple(folder / name for name in (str(keywords[GGUF]),) if (folder / name).exists())
    found = _weights(names, keywords.get("variant"))
    weights = [name for name in found if not name.endswith(".json")]
    # The index of .bin files has never been a part of the fingerprint.
    indices = [name for name in found if name.endswith(".json") and ".safetensors." in name]
    config = [CONFIG] if CONFIG in names else []
    return tuple(folder / name for name in (*weights, *config, *indices))


def choose(
    ref: str, repo: str, names: Iterable[str], *, keywords: Mapping[str, Any], random: bool = False
) -> list[str]:
    """Names of the files of a repository to fetch: configuration, tokenizer, and weights in one format.

    Code and other pickles than transformers' own `.bin` files, which are read with weights_only, are never fetched.

    Args:
        ref: The reference, for messages.
        repo: Name of the repository.
        names: Names of its files.
        keywords: Arguments of `from_pretrained`: gguf_file, subfolder and variant decide.
        random: Leave out the weights.

    Raises:
        LoadError: The repository has no configuration, or no weights that transformers reads.
    """
    sub = str(keywords.get("subfolder") or "").strip("/")
    start = f"{sub}/" if sub else ""
    own = [name.removeprefix(start) for name in names if name.startswith(start)]
    own = [name for name in own if "/" not in name]
    where = f"{ref}: {repo}{f', {sub},' if sub else ''}"
    wanted = [
        name
        for name in own
        if name in (CONFIG, "generation_config.json") or any(fnmatchcase(name, like) for like in COMPANIONS)
    ]
    gguf = keywords.get(GGUF)
    if gguf:
        if str(gguf) not in own:
            raise LoadError(f"{where} has no file {gguf}")
        return [start + name for name in dict.fromkeys((*wanted, str(gguf)))]
    if CONFIG not in own:
        raise LoadError(f"{where} {_instead(own)}")
    weights = [] if random else _weights(own, keywords.get("variant"))
    if not weights and not random:
        raise LoadError(
            f"{where} holds no weights that transformers reads (model.safetensors); {_other(own)}name a repository or "
            "a revision that has them"
        )
    return [start + name for name in dict.fromkeys((*wanted, *weights))]


def _weights(names: Iterable[str], variant: Any) -> list[str]:
    """Names of the weights in the first format that is there. Others are ignored, as by transformers."""
    there, middle = set(names), f".{variant}" if variant else ""
    for stem, ending in _STEMS:
        single, index = f"{stem}{middle}.{ending}", f"{stem}.{ending}.index{middle}.json"
        if single in there:
            # The index of a directory that has both is part of the fingerprint of saved directories.
            return [single, *({index} & there)]
        shards = sorted(name for name in there if fnmatchcase(name, f"{stem}{middle}-*.{ending}"))
        if shards:
            return [*shards, *({index} & there)]
    return []


def _instead(names: list[str]) -> str:
    """Description of a repository without a configuration, with a remedy."""
    if "adapter_config.json" in names:
        return "is a PEFT checkpoint; download it, and load it with surgery import-peft"
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        return f"has no {CONFIG}; give --model-kwarg {GGUF}={ggufs[0]}"
    return f"has no {CONFIG}, so it is no transformers model; name another"


def _other(names: list[str]) -> str:
    """Clause on weights in formats that are not read."""
    pickles = [
        name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"))
    ]
    return f"{pickles[0]} is not read, convert it to safetensors; " if pickles else ""
