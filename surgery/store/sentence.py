"""Writes a sentence-transformers directory: the transformers model, and the files of the modules after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from surgery.capture.sentence.layout import CONFIG, MODULES, OF_TRANSFORMER, SETTINGS, is_sentence_directory
from surgery.capture.sentence.modules import SentenceEncoder
from surgery.common.errors import ExportError
from surgery.common.readers import read_json
from surgery.engine.base import Base
from surgery.store.transformers_model import write_model

_PREFIX = "transformer."
_CLASSES = "sentence_transformers.models."


def parts_of(base: Base) -> list[tuple[str, str, str]]:
    """Class, folder and name of each module of the base, as its loader recorded them."""
    return [(str(kind), str(path), str(name)) for kind, path, name in base.loaded.metadata["parts"]]


def transformer_path(base: Base) -> str:
    """Folder of the transformers model in the directory, "" for the directory itself."""
    return parts_of(base)[0][1]


def write_sentence(
    base: Base, module: SentenceEncoder, state: Mapping[str, Tensor], folder: Path, max_shard_size: str | None
) -> None:
    """Write the weights and the configurations of all modules.

    Args:
        base: The base.
        module: Its module.
        state: Weights by name.
        folder: Directory to write.
        max_shard_size: Largest size of a file of the transformers model; None for the default.

    Raises:
        ExportError: A weight has no value, or a library reads another value from the directory.
    """
    inner: Any = module.transformer
    own = {n.removeprefix(_PREFIX): t for n, t in state.items() if n.startswith(_PREFIX)}
    tied = {
        name.removeprefix(_PREFIX): tuple(each.removeprefix(_PREFIX) for each in group)
        for name, group in base.names.items()
        if len(group) > 1
    }
    place = folder / transformer_path(base)
    place.mkdir(exist_ok=True)
    write_model(inner, base.loaded.config or inner.config, own, tied, place, max_shard_size=max_shard_size)
    write_modules(base, module, state, folder)


def write_modules(base: Base, module: SentenceEncoder, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write everything but the transformers model: the list of modules, their configurations and weights.

    Args:
        base: The base.
        module: Its module.
        state: Weights by name.
        folder: Directory to write.

    Raises:
        ExportError: A weight has no value, or another shape than its module.
    """
    source = Path(str(base.loaded.metadata["folder"]))
    copied = is_sentence_directory(source)
    parts = parts_of(base)
    names = (MODULES, SETTINGS, *(f"{parts[0][1]}/{name}".lstrip("/") for name in OF_TRANSFORMER))
    for name in names if copied else ():
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(source / name, folder / name)
    if not copied:
        listed = [
            {"idx": number, "name": str(number), "path": path, "type": _CLASSES + kind}
            for number, (kind, path, _) in enumerate(parts)
        ]
        _write_json(folder / MODULES, listed)
        _write_json(folder / OF_TRANSFORMER[0], {"max_seq_length": _longest(base)})
        size = int(module.transformer.config.hidden_size)  # type: ignore[union-attr,arg-type]
        _write_json(_made(folder / parts[1][1]) / CONFIG, {"word_embedding_dimension": size, **_MEAN})
    for kind, path, name in parts[1:]:
        place = _made(folder / path)
        if copied and (source / path / CONFIG).is_file():
            shutil.copy(source / path / CONFIG, place / CONFIG)
        wanted = module.get_submodule(name).state_dict()
        if not wanted:
            continue
        values = {key: _value(state, f"{name}.{key}", value, kind) for key, value in wanted.items()}
        save_file(values, place / "model.safetensors", metadata={"format": "pt"})


# The Pooling that the library makes of a transformers directory, in the form that every version reads.
_MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "pooling_mode_max_tokens": False}


def _longest(base: Base) -> int | None:
    """Number of positions of the transformers model, or None."""
    found = getattr(base.loaded.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _value(state: Mapping[str, Tensor], name: str, like: Tensor, kind: str) -> Tensor:
    value = state.get(name)
    if value is None or value.shape != like.shape:
        found = "no value" if value is None else f"the shape {list(value.shape)}"
        raise ExportError(
            f"{name} has {found} in the program, and {kind} needs {list(like.shape)}; export the program to ONNX"
        )
    return value.detach().cpu().contiguous().clone()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def names_of_files(folder: Path) -> list[Path]:
    """The files that the loader reads in a sentence-transformers directory."""
    paths = [str(each["path"]) for each in read_json(folder / MODULES, ExportError)]
    found = [*(folder / paths[0]).glob("*.safetensors"), *(folder / paths[0]).glob("*.index.json")]
    later = [folder / path / "model.safetensors" for path in paths[1:]]
    return sorted([*found, folder / paths[0] / CONFIG, *(file for file in later if file.is_file())])
